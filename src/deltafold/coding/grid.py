"""The step of every entry of a matrix, and the context in which its level is coded.

    unit(r, j) = unit 2^((rows[r] + columns[j]) / 2)       what a level of 1 stands for
    size(r)    = size 2^(sizes[r] / 2)                     how large entries of the row are
    w(r, j)    = unit(r, j) / size(r)

`rows`, `columns` and `sizes` are int8 vectors of half octaves, or None for zeros. A level can differ
from 0 only where the threshold t of the place is below |d| / unit, so hardly where t w is large:

    class of a place  min(16, floor(16 t m)),  m = w / 5 kept within 1 .. 2^12      17 classes
    group of a place  half octaves of w, from 1/16 (0) to 2 and above (10)          11 groups

The context is 17 group + class. Where steps are coarse, all places are in the last group.

Everything that the decoder needs is made of integers and of single products and comparisons of
floats, so it is the same on every machine. As bytes, little endian:

    flags u8 | first i16 | reach f32 | [rows o i8] | [columns i i8] | [sizes o i8]

with reach = unit / (5 size), first = the group of w at exponents 0 (unclipped), flags 1, 2, 4 for
the vectors that are there, 8 for rows = -floor(sizes / 2). The unit stands apart: it may be trained.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafold.coding.dither import CLASSES, THRESHOLDS, Thresholds
from deltafold.lazy import torch

Exponents = NDArray[np.int8]
GROUPS = 11
CONTEXTS = GROUPS * (CLASSES + 1)
REACH = 5.0  # sizes up to which thresholds are told apart
COARSE = 2.0  # w from which places are in the last group
MOST = 4096.0  # of m: a class is 16 thresholds wide at least
_ROWS, _COLUMNS, _SIZES, _FOLLOW = 1, 2, 4, 8
_HEAD = struct.Struct("<Bhf")


def powers(exponents: NDArray[np.integer]) -> NDArray[np.float32]:
    """2^(n / 2), fp32, from exact powers of two and one constant."""
    whole = np.ldexp(np.float32(1), exponents.astype(np.int32) >> 1).astype(np.float32)
    return np.where(exponents & 1, whole * np.float32(2**0.5), whole).astype(np.float32)


@dataclass(frozen=True)
class Grid:
    """See above. `rows` and `sizes` are (o,), `columns` is (i,)."""

    unit: np.float32
    reach: np.float32
    first: int
    rows: Exponents | None = None
    columns: Exponents | None = None
    sizes: Exponents | None = None
    follow: bool = False  # rows follow from sizes

    @classmethod
    def of(
        cls,
        unit: float,
        size: float,
        rows: Exponents | None = None,
        columns: Exponents | None = None,
        sizes: Exponents | None = None,
        follow: bool = False,
    ) -> Grid:
        """A grid of this unit and size at exponents 0."""
        first = int(np.floor(2 * np.log2(unit / size / COARSE))) + GROUPS - 1
        if follow and sizes is not None:
            rows = following(sizes)
        reach = np.float32(unit / size / REACH)
        return cls(np.float32(unit), reach, first, rows, columns, sizes, follow)

    def row_units(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """The unit of each of some rows, before columns: (n, 1) fp32."""
        if self.rows is None:
            return torch.full((len(rows), 1), float(self.unit), dtype=torch.float32, device="cpu")
        return torch.from_numpy(powers(self.rows[rows]) * self.unit)[:, None]

    def column_units(self, columns: int) -> torch.Tensor:
        """Factor of the unit of each column, (i,) fp32."""
        if self.columns is None:
            return torch.ones(columns, dtype=torch.float32, device="cpu")
        return torch.from_numpy(powers(self.columns))

    def contexts(self, rows: NDArray[np.int64], found: Thresholds) -> NDArray[np.uint8]:
        """Context of each place of some rows, flat, from their thresholds (n, i)."""
        n, i = found.shape
        exponents = np.zeros(n, dtype=np.int32)
        if self.rows is not None:
            exponents += self.rows[rows]
        if self.sizes is not None:
            exponents -= self.sizes[rows]
        columns = np.zeros(i, np.int32) if self.columns is None else self.columns.astype(np.int32)
        m = torch.from_numpy(powers(exponents) * self.reach)[:, None]
        m = (m * torch.from_numpy(powers(columns))).clamp_(1.0, MOST)
        place = torch.from_numpy(found.astype(np.int32)).float().mul_(CLASSES / THRESHOLDS)
        classes = place.mul_(m).clamp_(max=CLASSES).to(torch.uint8).numpy()
        lowest = int(exponents.min()) + int(columns.min()) + self.first
        if lowest >= GROUPS - 1:
            groups: NDArray[np.integer] = np.array(GROUPS - 1)
        else:
            total = exponents[:, None].astype(np.int16) + columns.astype(np.int16) + self.first
            groups = np.clip(total, 0, GROUPS - 1)
        return (classes + (CLASSES + 1) * groups.astype(np.uint8)).reshape(-1)

    def to_bytes(self) -> bytes:
        """The bytes of the head and its vectors."""
        vectors = [(_ROWS, None if self.follow else self.rows), (_COLUMNS, self.columns),
                   (_SIZES, self.sizes)]  # fmt: skip
        flags = sum(flag for flag, vector in vectors if vector is not None)
        head = _HEAD.pack(flags | _FOLLOW * self.follow, self.first, self.reach)
        return head + b"".join(vector.tobytes() for _, vector in vectors if vector is not None)

    @classmethod
    def from_bytes(cls, data: bytes, shape: tuple[int, int], unit: float) -> tuple[Grid, bytes]:
        """(the grid of an o x i matrix, what follows it). Raises ValueError for damage."""
        o, i = shape
        if len(data) < _HEAD.size:
            raise ValueError("the grid of steps ends too early")
        flags, first, reach = _HEAD.unpack_from(data)
        at, found = _HEAD.size, []
        for flag, size in ((_ROWS, o), (_COLUMNS, i), (_SIZES, o)):
            wanted = size if flags & flag else 0
            if at + wanted > len(data):
                raise ValueError("the grid of steps ends too early")
            found.append(np.frombuffer(data, np.int8, wanted, at) if wanted else None)
            at += wanted
        rows, columns, sizes = found
        if not (np.isfinite(unit) and np.isfinite(reach) and unit > 0 and reach > 0):
            raise ValueError("the steps are damaged")
        follow = bool(flags & _FOLLOW)
        if flags >= 16 or (follow and (sizes is None or rows is not None)):
            raise ValueError("the grid of steps is damaged")
        if follow and sizes is not None:
            rows = following(sizes)
        grid = cls(np.float32(unit), np.float32(reach), first, rows, columns, sizes, follow)
        return grid, data[at:]


def following(sizes: Exponents) -> Exponents:
    """Exponents of the rows' steps that shrink as the square root of the rows' sizes."""
    return (-(sizes >> 1)).astype(np.int8)
