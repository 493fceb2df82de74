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
_WIDE = 1 << 20  # more steps than these count as these


def exponents(bits: Bits, dtype: torch.dtype) -> Classes:
    """The exponent field of floats (n,), eighths of it for fp64; the bit length of integers, as uint8."""
    mantissa = _MANTISSA.get(str(dtype))
    if mantissa is None:
        return _bit_lengths(bits, dtype.is_signed)
    if mantissa == 52:
        mantissa = 55
    sign = 8 * bits.dtype.itemsize - 1
    field = (bits >> bits.dtype.type(mantissa)).astype(np.uint8)  # a ninth bit, the sign, falls off
    return field if sign - mantissa == 8 else field & np.uint8((1 << (sign - mantissa)) - 1)


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
        tops = np.clip(self.rows.astype(np.int64) + self.origin, -20000, 20000).astype(np.int16)
        for row in range(0, len(tops), step):
            both = (tops[row : row + step, None] + self.columns[None, :]).reshape(-1)
            at = slice(row * size, row * size + len(both))
            unit = np.maximum(exponent[at], 1).astype(np.int16)
            unit <<= np.int16(2)
            both -= unit
            np.clip(both, 0, 255, out=both)
            classes[at] = both
        return classes


def scaling_of(
    moves: Bits, exponent: Classes, shape: tuple[int, int], by_column: bool = True
) -> Scaling:
    """Scales of a matrix o x i from the zig-zagged moves of all its values (o i,).

    Without `by_column` all columns have the same.
    """
    most = max(1, int(exponent.max()))
    o, i = shape
    rows, columns = np.zeros(o, dtype=np.int64), np.zeros(i, dtype=np.int64)
    step = max(1, (1 << 18) // i)
    for row in range(0, o, step):
        at = slice(row * i, min(o, row + step) * i)
        size = (moves[at] >> moves.dtype.type(1)) + (moves[at] & moves.dtype.type(1))
        wide = np.minimum(size, size.dtype.type(min(_WIDE, np.iinfo(size.dtype).max))).astype(
            np.int64
        )
        shift = np.maximum(exponent[at], 1).astype(np.int64) - (most - 20)
        wide = (wide << np.maximum(shift, 0)).reshape(-1, i)
        rows[row : row + step] = wide.sum(1)
        columns += wide.sum(0)
    whole = int(_quarters(rows.sum(keepdims=True), o * i)[0])
    row_scale = _quarters(rows, i)
    column_scale = _quarters(columns, o) if by_column else np.full(i, whole, dtype=np.int16)
    # Expected steps: row mean x column mean / whole mean, in units of the weight's own exponent.
    origin = QUARTERS * (most - 20) + _MIDDLE - whole - 510
    origin += int(row_scale.max()) + int(column_scale.max())
    return Scaling(_from_top(row_scale), _from_top(column_scale), origin)


def _from_top(scales: Scales) -> Scales:
    return np.clip(scales - scales.max() + 255, 0, 255).astype(np.int16)


_MIDDLE = 128  # the class of values that move by one step
_EDGES = (0.5452538663326288, 0.6484197773255048, 0.7711054127039704, 0.9170040432046712)
"""2^(-7/8), 2^(-5/8), 2^(-3/8), 2^(-1/8): where quarters of an octave round up."""


def _quarters(total: NDArray[np.int64], count: int) -> Scales:
    """log2 of total / count, rounded to quarters; of nothing, as of 1 / count."""
    mean, octave = np.frexp(np.maximum(total, 1) / max(1, count))
    return (4 * (octave - 1) + np.searchsorted(_EDGES, mean)).astype(np.int16)


class Order:
    """All values (n,) by group and, within one, in order; sorted in pieces that stay in the cache.

    `sizes` (groups,) says how many each group has. Ranks count within a group.
    """

    def __init__(self, groups: Classes, count: int):
        starts = range(0, len(groups), _PIECE)
        self._local = np.empty(len(groups), dtype=np.uint16)  # place in its piece, in sorted order
        firsts = np.zeros((len(starts), count), dtype=np.int64)
        for number, start in enumerate(starts):
            piece = groups[start : start + _PIECE]
            places = np.argsort(piece, kind="stable")
            self._local[start : start + _PIECE] = places
            firsts[number] = np.searchsorted(piece[places], np.arange(count)) + start
        ends = np.append(firsts.reshape(-1)[1:], len(groups)) if len(starts) else firsts.reshape(-1)
        sizes = ends.reshape(firsts.shape) - firsts
        self._firsts, self._count = firsts, count  # of each piece's groups, in the sorted whole
        self._ranks = np.cumsum(sizes, axis=0) - sizes
        self.sizes = sizes.sum(0)

    def gathered(self, values: Bits) -> Bits:
        """Values (n,) in sorted order, piece by piece."""
        out = np.empty_like(values)
        for start in range(0, len(values), _PIECE):
            piece = slice(start, start + _PIECE)
            np.take(values[piece], self._local[piece], out=out[piece], mode="clip")
        return out

    def scattered(self, values: Bits) -> Bits:
        """Inverse of `gathered`."""
        out = np.empty_like(values)
        for start in range(0, len(values), _PIECE):
            piece = slice(start, start + _PIECE)
            out[piece][self._local[piece]] = values[piece]
        return out

    def marked(self, group: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the sorted order the values of these ranks (k,) of a group are."""
        piece = np.searchsorted(self._ranks[:, group], ranks, side="right") - 1
        return self._firsts[piece, group] + ranks - self._ranks[piece, group]

    def places(self, marks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the values at `marks` (k,) of the sorted order."""
        return marks - marks % _PIECE + self._local[marks]

    def run(self, group: int, values: Bits) -> Bits:
        """The values of a group out of all in sorted order."""
        return np.concatenate([values[a:b] for a, b in self._spans(group)] or [values[:0]])

    def put(self, group: int, run: Bits, values: Bits) -> None:
        """Inverse of `run`, into `values`."""
        done = 0
        for a, b in self._spans(group):
            values[a:b] = run[done : done + b - a]
            done += b - a

    def _spans(self, group: int) -> list[tuple[int, int]]:
        first = self._firsts[:, group]
        ends = np.append(self._ranks[1:, group], self.sizes[group]) - self._ranks[:, group] + first
        return list(zip(first.tolist(), ends.tolist(), strict=True))


_PIECE = 1 << 14
