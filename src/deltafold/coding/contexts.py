"""What a base weight says about how it will change: the classes that the codec `context` codes by.

An optimiser's step has about the same size for every weight, so the number of representable values
that it crosses follows from the weight's exponent. Where rows and columns differ in how much they
change, their usual change over the exponent's unit says more. A class is

    exponent                                                        without scales
    row scale + column scale - 4 exponent, in quarters of an octave  with them

cut off at 0 and 255. The decoder holds the base, so a class costs nothing. All is integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafold.lazy import torch

Bits = NDArray[np.unsignedinteger]
Classes = NDArray[np.uint8]
Scales = NDArray[np.int16]
QUARTERS = 4
_MANTISSA = {
    "torch.float64": 52, "torch.float32": 23, "torch.float16": 10, "torch.bfloat16": 7,
    "torch.float8_e4m3fn": 3, "torch.float8_e5m2": 2,
}  # fmt: skip
_WIDE = 1 << 20  # magnitudes are counted in units 2^-20 of the largest exponent's


def exponents(bits: Bits, dtype: torch.dtype) -> Classes:
    """The exponent field of floats (n,), eighths of it for fp64; the bit length of integers, as uint8."""
    mantissa = _MANTISSA.get(str(dtype))
    if mantissa is None:
        return _bit_lengths(bits, dtype.is_signed)
    width = 8 * bits.dtype.itemsize
    field = (bits >> bits.dtype.type(mantissa)) & bits.dtype.type((1 << (width - 1 - mantissa)) - 1)
    return (field >> 3 if mantissa == 52 else field).astype(np.uint8)


def _bit_lengths(bits: Bits, signed: bool) -> Classes:
    if signed:
        top = bits >> bits.dtype.type(8 * bits.dtype.itemsize - 1)
        bits = bits ^ (bits.dtype.type(0) - top)
    wide = bits.astype(np.uint64)
    high = (wide >> np.uint64(32)).astype(np.float64)
    low = (wide & np.uint64(0xFFFFFFFF)).astype(np.float64)
    length = np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1])
    return length.astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Scaling:
    """The usual change of each row (o,) and column (i,): 0 to 255 quarters of an octave over `origin`."""

    rows: Scales
    columns: Scales
    origin: int

    def classes(self, exponent: Classes) -> Classes:
        """Classes of all values of the matrix, flat, given their exponents (o i,)."""
        classes = np.empty(len(exponent), dtype=np.uint8)
        size, step = len(self.columns), max(1, _PIECE // max(1, len(self.columns)))
        for row in range(0, len(self.rows), step):
            both = self.rows[row : row + step, None] + self.columns[None, :]
            at = slice(row * size, row * size + both.size)
            both = both.reshape(-1).astype(np.int32) + self.origin
            both -= np.maximum(exponent[at], 1).astype(np.int32) << 2
            classes[at] = np.clip(both, 0, 255)
        return classes


def scaling_of(
    places: NDArray[np.int64], moves: Bits, exponent: Classes, shape: tuple[int, int]
) -> Scaling:
    """Scales of a matrix o x i from the zig-zagged moves (k,) of the values at `places` (k,)."""
    size = (moves >> moves.dtype.type(1)).astype(np.uint64) + (moves & moves.dtype.type(1))
    size = np.minimum(size, np.uint64(1 << 20)).astype(np.int64)
    most = int(exponent.max())
    shift = np.maximum(exponent[places], 1).astype(np.int64) - most + 20
    size = np.where(shift >= 0, size << np.maximum(shift, 0), 0)
    by_row, by_column = np.divmod(places, shape[1])
    rows = _quarters(_sums(by_row, size, shape[0]), shape[1])
    columns = _quarters(_sums(by_column, size, shape[1]), shape[0])
    whole = int(_quarters(np.array([size.sum()]), shape[0] * shape[1])[0])
    # Expected steps: row mean x column mean / whole mean, in units of the weight's own exponent.
    origin = QUARTERS * (most - 20) + _MIDDLE - whole + int(rows.max()) + int(columns.max()) - 510
    return Scaling(_from_top(rows), _from_top(columns), origin)


def _sums(groups: NDArray[np.int64], size: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Sums of `size` (k,) by group, exactly: halves of them fit the doubles that numpy adds up."""
    low = np.bincount(groups, weights=size & 0xFFFFF, minlength=count)
    high = np.bincount(groups, weights=size >> 20, minlength=count)
    return low.astype(np.int64) + (high.astype(np.int64) << 20)


def _from_top(scales: Scales) -> Scales:
    return np.clip(scales - scales.max() + 255, 0, 255).astype(np.int16)


_MIDDLE = 128  # the class of values that move by one step
_EDGES = (0.5452538663326288, 0.6484197773255048, 0.7711054127039704, 0.9170040432046712)
"""2^(-7/8), 2^(-5/8), 2^(-3/8), 2^(-1/8): where quarters of an octave round up."""


def _quarters(total: NDArray[np.int64], count: int) -> Scales:
    """log2 of total / count, rounded to quarters; of nothing, as of 1 / count."""
    mean, octave = np.frexp(np.maximum(total, 1) / max(1, count))
    return (4 * (octave - 1) + np.searchsorted(_EDGES, mean)).astype(np.int16)


def group_order(groups: Classes, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(order (n,), bounds (count + 1,)): positions by group and, within one, ascending.

    Those of group g are order[bounds[g] : bounds[g + 1]]. Sorted in pieces that stay in the cache.
    """
    pieces = range(0, len(groups), _PIECE)
    sizes = np.zeros((count, len(pieces)), dtype=np.int64)
    for number, start in enumerate(pieces):
        sizes[:, number] = np.bincount(groups[start : start + _PIECE], minlength=count)
    bounds = np.concatenate([[0], np.cumsum(sizes.sum(1))])
    at = bounds[:-1, None] + np.cumsum(sizes, axis=1) - sizes
    order = np.empty(len(groups), dtype=np.int32)
    for number, start in enumerate(pieces):
        places = np.argsort(groups[start : start + _PIECE], kind="stable") + start
        done = 0
        for group in np.flatnonzero(sizes[:, number]).tolist():
            size = int(sizes[group, number])
            to = int(at[group, number])
            order[to : to + size] = places[done : done + size]
            done += size
    return order, bounds


_PIECE = 1 << 14
