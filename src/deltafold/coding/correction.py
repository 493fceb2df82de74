"""A low-rank correction of a delta: vectors in bytes, zero until training makes something of it.

    C = L^T R       L  r x o,  R  r x i;  row k of either is a scale times whole numbers -127 .. 127

One part `fix` of r (o + i) + 8 r bytes, little endian:

    scales of L  r x f32 | scales of R  r x f32 | L  r x o i8 | R  r x i i8

Training starts from L = 0. The scales of L then hold the size of the matrix's delta, in which L is
trained; so that the correction is decoded as zero, and says what its units are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltafold.coding.counter import derive_key, gaussian
from deltafold.coding.sums import product_rows
from deltafold.coding.trainable import straight_through
from deltafold.lazy import torch

LEVELS = 127


@dataclass(frozen=True)
class Correction:
    """Scales (r, 1) fp32 and levels (r, o), (r, i) int8 of both factors."""

    left_scales: torch.Tensor
    right_scales: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of C, (stop - start, i), fp32; summed as `sums.product_rows` does."""
        left = self.left[:, start:stop].double() * self.left_scales.double()
        right = self.right.double() * self.right_scales.double()
        return torch.cat([rows for _, rows in product_rows(left, right)])

    def to_part(self) -> torch.Tensor:
        """The bytes (n,), uint8."""
        scales = torch.cat([self.left_scales, self.right_scales]).numpy().astype("<f4").tobytes()
        data = scales + self.left.numpy().tobytes() + self.right.numpy().tobytes()
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def fix_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes of the part `fix` of an o x i matrix."""
    return rank * (sum(shape) + 8)


def blank(shape: tuple[int, int], rank: int, size: float, key: int) -> Correction:
    """The start: L = 0, R normally distributed by the seed; `size` is that of the delta."""
    o, i = shape
    right = gaussian(derive_key(key, "correction"), rank, i)
    scales, levels = rounded(torch.from_numpy(right).float())
    return Correction(
        torch.full((rank, 1), size, dtype=torch.float32, device="cpu"),
        scales,
        torch.zeros(rank, o, dtype=torch.int8, device="cpu"),
        levels,
    )


def read(part: torch.Tensor, shape: tuple[int, int], rank: int) -> Correction:
    """From the part `fix`, bytes (n,). Raises ValueError if its scales are no numbers."""
    o, i = shape
    data = part.numpy().tobytes()
    scales = torch.from_numpy(np.frombuffer(data, "<f4", 2 * rank).astype(np.float32))
    if not scales.isfinite().all():
        raise ValueError("the correction's scales are damaged")
    levels = torch.from_numpy(np.frombuffer(data, np.int8, offset=8 * rank).copy())
    left, right = levels.split([rank * o, rank * i])
    return Correction(
        scales[:rank, None], scales[rank:, None], left.reshape(rank, o), right.reshape(rank, i)
    )


def rounded(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales (r, 1), levels (r, n) int8) of vectors (r, n): each row by its largest entry."""
    scales = vectors.abs().amax(dim=1, keepdim=True) / LEVELS
    levels = torch.where(
        scales > 0,
        vectors / scales.clamp_min(1e-38),
        torch.zeros((), dtype=torch.float32, device="cpu"),
    )
    return scales, levels.round().to(torch.int8)


def through(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (r, n) as they will be stored; gradients pass straight through."""
    scales, levels = rounded(vectors.detach())
    return straight_through(vectors, levels.float() * scales)
