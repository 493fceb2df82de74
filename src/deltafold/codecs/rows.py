"""`rows`: the rows that changed, exactly. For embeddings, where training touches some tokens only.

Layout, for K changed rows of o:

    index    which rows: gaps between them, int32, through zstd
    plane0.. differences of bit patterns of those rows, byte planes, zstd

New vocabulary rows are a piece of their own with no reference (see `docs/format.md`). Lost: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deltafold.codecs.base import ExactCodec, Parts, Settings
from deltafold.coding.planes import (
    bit_pattern,
    compress_planes,
    decompress_planes,
    deflate,
    difference,
    inflate,
    undo_difference,
)
from deltafold.lazy import torch


def changed_rows(reference: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Boolean vector (o,) of two matrices (o, i): rows that differ in any bit."""
    shape = tuple(reference.shape)
    differs = bit_pattern(reference).reshape(shape) != bit_pattern(tuned).reshape(shape)
    return torch.from_numpy(differs.any(axis=1))


class Rows(ExactCodec):
    name = "rows"
    title = "exact: changed rows of embeddings"
    paper = "-"
    method = False

    def encode(self, reference: torch.Tensor, tuned: torch.Tensor) -> tuple[Settings, Parts]:
        index = torch.nonzero(changed_rows(reference, tuned)).reshape(-1)
        gaps = np.diff(index.numpy(), prepend=0).astype("<i4")
        parts = {"index": deflate(gaps.tobytes())}
        return {"changed": len(index)}, parts | compress_planes(
            difference(tuned[index], reference[index])
        )

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, reference: torch.Tensor
    ) -> torch.Tensor:
        count = int(settings["changed"])
        gaps = np.frombuffer(inflate(parts["index"], 4 * count), dtype="<i4")
        index = torch.from_numpy(np.cumsum(gaps, dtype=np.int64))
        if count and not (bool((gaps >= 0).all()) and int(index[-1]) < len(reference)):
            raise ValueError("row numbers lie outside the tensor")
        out = reference.clone()
        columns = reference.shape[1]
        zigzag = decompress_planes(dict(parts), reference.element_size(), count * columns)
        out[index] = undo_difference(zigzag, reference[index])
        return out


CODEC = Rows
