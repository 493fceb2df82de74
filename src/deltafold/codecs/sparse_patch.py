"""`sparse-patch`: the values that changed, exactly, and where they are.

For fine-tunes that change few bf16 values at all (reinforcement learning, low learning rates).

Layout, for K changed values of N:

    low, high  positions, Elias-Fano (about 2 + log2(N / K) bits each) -- or
    bitmap     N bits through zstd, where that is smaller
    plane0..   differences of bit patterns at those positions, byte planes, zstd

Lost: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deltafold.codecs.base import ExactCodec, Parts, Settings
from deltafold.coding.packing import EliasFano
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


def _uint8(data: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data))


class SparsePatch(ExactCodec):
    name = "sparse-patch"
    title = "exact: changed values, positions"
    paper = "-"

    def encode(self, reference: torch.Tensor, tuned: torch.Tensor) -> tuple[Settings, Parts]:
        changed = bit_pattern(reference) != bit_pattern(tuned)
        positions = np.flatnonzero(changed)
        coder = EliasFano(len(positions), changed.size)
        bitmap = deflate(np.packbits(changed).tobytes())
        parts: Parts
        if coder.low_bytes + coder.high_bytes <= len(bitmap):
            low, high = coder.encode(positions)
            parts = {"low": _uint8(low), "high": _uint8(high)}
        else:
            parts = {"bitmap": bitmap}
        index = torch.from_numpy(positions)
        at_tuned, at_reference = tuned.reshape(-1)[index], reference.reshape(-1)[index]
        parts |= compress_planes(difference(at_tuned, at_reference))
        return {"changed": len(positions)}, parts

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, reference: torch.Tensor
    ) -> torch.Tensor:
        count, total = int(settings["changed"]), reference.numel()
        if "bitmap" in parts:
            bits = np.frombuffer(inflate(parts["bitmap"], -(-total // 8)), dtype=np.uint8)
            positions = np.flatnonzero(np.unpackbits(bits, count=total))
            if len(positions) != count:
                raise ValueError(f"{len(positions)} positions found, {count} promised")
        else:
            positions = EliasFano(count, total).decode(parts["low"].numpy(), parts["high"].numpy())
        index = torch.from_numpy(positions)
        flat = reference.reshape(-1).clone()
        zigzag = decompress_planes(dict(parts), reference.element_size(), count)
        flat[index] = undo_difference(zigzag, flat[index])
        return flat.reshape(reference.shape)


CODEC = SparsePatch
