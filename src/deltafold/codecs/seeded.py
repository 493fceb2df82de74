"""Entries at chosen positions of a delta, gathered and put back, a piece of the matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from deltafold.codecs.base import Shape
from deltafold.coding.counter import kept_positions
from deltafold.lazy import torch
from deltafold.linalg.matrices import RowMatrix, chunks

_DECODE_VALUES = 2 << 20  # values decoded at once


def inside(
    positions: NDArray[np.int64], start: int, n_rows: int, i: int
) -> tuple[int, int, torch.Tensor]:
    """(first, last, places (n,)) of the positions in these rows; places count from the first row."""
    first, last = np.searchsorted(positions, [start * i, (start + n_rows) * i])
    return int(first), int(last), torch.from_numpy(positions[first:last] - start * i)


def gathered(
    delta: RowMatrix, positions: NDArray[np.int64]
) -> Iterator[tuple[torch.Tensor, int, int, torch.Tensor]]:
    """(rows, first, last, entries): some rows (n, i), and the entries (last - first,) in them.

    `first` and `last` number these among all positions.

    All rows are given, in order; positions ascend.
    """
    i = delta.shape[1]
    for start, rows in chunks(delta):
        first, last, at = inside(positions, start, len(rows), i)
        yield rows, first, last, rows.reshape(-1)[at]


def entries_at(delta: RowMatrix, positions: NDArray[np.int64]) -> torch.Tensor:
    """The entries (n,) at n ascending positions, fp32."""
    entries = torch.zeros(len(positions), dtype=torch.float32, device="cpu")
    for _, first, last, found in gathered(delta, positions):
        entries[first:last] = found
    return entries


def scattered(
    kept: int,
    values: Callable[[int, int], torch.Tensor],
    shape: Shape,
    key: int,
    threshold: int,
    what: str = "values",
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows (n, i)): `values(first, last)` at the positions that the seed gives, else zero.

    Raises ValueError if the seed gives more or fewer than `kept`; `what` names them.
    """
    o, i = shape
    used = 0
    step = max(1, _DECODE_VALUES // i)
    for start in range(0, o, step):
        stop = min(o, start + step)
        at = torch.from_numpy(kept_positions(key, start * i, stop * i, threshold) - start * i)
        if used + len(at) > kept:
            raise ValueError(f"the seed gives more positions than {what} are stored")
        rows = torch.zeros((stop - start) * i, dtype=torch.float32, device="cpu")
        rows[at] = values(used, used + len(at))
        used += len(at)
        yield start, rows.reshape(stop - start, i)
    if used != kept:
        raise ValueError(f"{kept} {what} are stored, the seed gives {used} positions")
