"""`lossless`: every bit of the fine-tune, as compressed differences of bit patterns.

Source: own. Ordered integer differences in place of the older XOR save about a fifth more; see
`coding/planes.py`.

Layout: one zstd frame a byte plane of the zig-zagged difference, low plane first.

    plane0  uint8  low bytes        nearly incompressible
    plane1  uint8  high bytes       nearly empty for a fine-tune: almost free

Lost: nothing. Works on any dtype, NaN payloads included.
"""

from __future__ import annotations

from collections.abc import Mapping

from deltafold.codecs.base import ExactCodec, Parts, Settings
from deltafold.coding.planes import (
    compress_planes,
    decompress_planes,
    difference,
    undo_difference,
)
from deltafold.lazy import torch


class Lossless(ExactCodec):
    name = "lossless"
    title = "exact: integer differences, zstd"
    paper = "-"

    def encode(self, reference: torch.Tensor, tuned: torch.Tensor) -> tuple[Settings, Parts]:
        return {}, compress_planes(difference(tuned, reference))

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, reference: torch.Tensor
    ) -> torch.Tensor:
        zigzag = decompress_planes(dict(parts), reference.element_size(), reference.numel())
        return undo_difference(zigzag, reference)


CODEC = Lossless
