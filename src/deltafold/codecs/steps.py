"""Which steps the entries of a delta get: a `Grid` from its sizes, and from what errors cost.

The formula and its reasons: `codecs/auto.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from deltafold.coding.dither import MAX_LEVEL
from deltafold.coding.grid import Exponents, Grid
from deltafold.lazy import torch
from deltafold.linalg.matrices import RowMatrix, chunks

UNEVEN = 0.35  # standard deviation of log2(row's root mean square) from which rows have sizes
SMALLEST, LARGEST = -28, 8  # half octaves of a row's size, from the matrix's
ROW_FLOOR, COLUMN_FLOOR = 0.1, 0.3  # of the mean: entries may matter on text not seen
TRUST = 0.5  # between the same relative step in all matrices (0) and the same loss per byte (1)
LEAST_WEIGHT, MOST_WEIGHT = 1 / 8, 8.0
_NO_TAIL = 39.0  # standard deviations from which a tail of the normal distribution is 0 in fp64
_erfc = np.frompyfunc(math.erfc, 1, 1)  # numpy has none, and torch takes longer to import


RowSizes = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Root mean square, and largest magnitude, of each row (o,)."""


def grid_for(
    delta: RowMatrix, step: float, uniform: bool = False, sizes_of: RowSizes | None = None
) -> Grid | None:
    """Steps for a matrix; None if it is zero. `uniform` does not look at what errors cost.

    `sizes_of` is `row_sizes(delta)`, for a caller that asks for several steps.
    """
    size, largest = row_sizes(delta) if sizes_of is None else sizes_of
    sigma = float(np.sqrt(np.square(size).mean()))
    if sigma < 1e-30:
        return None
    sizes = _uneven(size, sigma)
    fisher = None if uniform else delta.fisher
    if fisher is None or not 0 < fisher.mean < np.inf:
        grid = Grid.of(step * sigma, sigma, sizes=sizes, follow=sizes is not None)
        return _within_reach(delta, grid, largest)
    weight = float(np.clip((sigma * fisher.mean**0.5) ** -TRUST, LEAST_WEIGHT, MOST_WEIGHT))
    n_bytes = normal_rate(step * weight) * size.size * delta.shape[1] / 8
    rows = _worth(*_octaves(fisher.rows, ROW_FLOOR), n_bytes)
    columns = _worth(*_octaves(fisher.columns, COLUMN_FLOOR), n_bytes)
    return _within_reach(
        delta, Grid.of(step * weight * sigma, sigma, rows, columns, sizes), largest
    )


def row_sizes(delta: RowMatrix) -> RowSizes:
    """One pass over the delta."""
    sizes, largest = [], []
    for _, rows in chunks(delta):
        sizes.append(rows.double().square().mean(dim=1).sqrt())
        largest.append(rows.abs().amax(dim=1).double())
    return np.asarray(torch.cat(sizes).numpy()), np.asarray(torch.cat(largest).numpy())


def _within_reach(delta: RowMatrix, grid: Grid, largest: NDArray[np.float64]) -> Grid:
    """The grid with coarser rows where an entry would be more than `MAX_LEVEL` units."""
    o, i = delta.shape
    columns = grid.column_units(i)
    units = grid.row_units(np.arange(o))[:, 0].double().numpy()
    if (largest <= MAX_LEVEL * units * float(columns.min())).all():
        return grid
    most = [(rows.abs() / columns).amax(dim=1).double() for _, rows in chunks(delta)]
    with np.errstate(divide="ignore"):
        short = np.ceil(np.log2(torch.cat(most).numpy() / (MAX_LEVEL * units)))
    if not (short > 0).any():
        return grid
    rows = np.zeros(o, np.int8) if grid.rows is None else grid.rows
    rows = np.clip(rows + 2 * np.maximum(short, 0), -80, 80).astype(np.int8)
    return replace(grid, rows=rows, follow=False)


def _uneven(size: NDArray[np.float64], sigma: float) -> Exponents | None:
    """Half octaves of the rows' sizes from sigma; None where rows are alike."""
    some = size[size > 0]
    if np.log2(some).std() <= UNEVEN and len(some) == len(size):
        return None
    with np.errstate(divide="ignore"):
        exact = np.rint(2 * np.log2(size / sigma))
    return np.clip(exact, SMALLEST, LARGEST).astype(np.int8)


def _octaves(cost: torch.Tensor, floor: float) -> tuple[Exponents, float]:
    """(half octaves of steps for these costs, whole octaves only; share of bytes that they save).

    With steps in proportion to c^-1/2, bytes times divergence are (mean c^1/2)^2, else mean c.
    """
    mean = float(cost.double().mean())
    full = cost.double().numpy() / mean + floor
    exponents = 2 * np.rint(-0.5 * np.log2(full))
    saved = 1 - np.sqrt(full).mean() ** 2 / full.mean()
    return np.clip(exponents, -40, 40).astype(np.int8), float(saved)


def _worth(exponents: Exponents, saved: float, n_bytes: float) -> Exponents | None:
    """The vector, if it saves more than it costs when the matrix takes `n_bytes`."""
    _, counts = np.unique(exponents, return_counts=True)
    share = counts / len(exponents)
    cost = -(share * np.log2(share)).sum() * len(exponents) / 8 * 1.15 + 8
    return exponents if saved * n_bytes > cost else None


@cache
def normal_rates() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, bits a value) of standard normal values, the threshold known; steps ascend."""
    steps = np.geomspace(0.1, 4096, 140)
    t = (np.arange(256) + 0.5) / 256
    rates = []
    for step in steps:
        # |x| >= k - 1 + t gives level k: tails of the normal distribution.
        edges = (np.arange(MAX_LEVEL)[:, None] + t) * step
        near = int(np.searchsorted(edges[:, 0], _NO_TAIL))
        tail = np.zeros(edges.shape)
        tail[:near] = _erfc(edges[:near] / 2**0.5)
        p = np.concatenate([1 - tail[:1], tail[:-1] - tail[1:], tail[-1:]])
        bits = np.where(p > 0, -p * np.log2(np.maximum(p, 1e-300)), 0).sum(axis=0) + tail[0]
        rates.append(bits.mean())
    return steps, np.array(rates)


def normal_rate(step: float) -> float:
    """Bits a value of standard normal values at this step."""
    steps, rates = normal_rates()
    return float(np.exp(np.interp(np.log(step), np.log(steps), np.log(rates))))
