"""Levels of a matrix as bytes: the grid of their steps, tables of odds, entropy-coded blocks.

The layout is described in `codecs/auto.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deltafold.coding import dither
from deltafold.coding.dither import CLASSES, MAX_LEVEL, Levels
from deltafold.coding.entropy import decode as decode_words
from deltafold.coding.entropy import encode as encode_words
from deltafold.coding.grid import CONTEXTS, GROUPS, Grid
from deltafold.coding.planes import deflate, inflate_any
from deltafold.lazy import torch

BLOCK_VALUES = 1 << 20
Shape = tuple[int, int]


def blocks(o: int, i: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of the blocks that are coded apart."""
    step = max(1, BLOCK_VALUES // i)
    for start in range(0, o, step):
        yield start, min(o, start + step)


def row_thresholds(rows: NDArray[np.int64], i: int, key: int) -> NDArray[np.uint16]:
    """Thresholds of whole rows, (n, i)."""
    if len(rows) == rows[-1] - rows[0] + 1:
        start = int(rows[0]) * i
        return dither.thresholds(key, start, start + len(rows) * i).reshape(-1, i)
    return np.stack([dither.thresholds(key, int(r) * i, int(r + 1) * i) for r in rows])


def histogram_of(levels: Levels, contexts: NDArray[np.uint8], top: int) -> NDArray[np.int64]:
    """How often each |level| 0 .. top occurs in each context, (contexts, top + 1)."""
    return dither.histogram_of(levels.reshape(-1), contexts, CONTEXTS, top)


def top_of(levels: Levels) -> int:
    """The largest |level|, at least 1."""
    return max(1, int(np.abs(levels).max(initial=0)))


def side_bytes(grid: Grid, histogram: NDArray[np.int64]) -> int:
    """Bytes that stand before the blocks, about."""
    return 8 + len(_side(grid, *_odds(histogram))[0])


def _odds(histogram: NDArray[np.int64]) -> tuple[int, int, NDArray[np.uint8]]:
    """(lowest group that occurs, highest, odds (contexts of these groups, top))."""
    seen = np.flatnonzero(histogram.sum(axis=1)) // (CLASSES + 1)
    low, high = int(seen.min()), int(seen.max())
    return low, high, dither.odds_of(histogram[(CLASSES + 1) * low : (CLASSES + 1) * (high + 1)])


def _side(grid: Grid, low: int, high: int, odds: NDArray[np.uint8]) -> tuple[bytes, int]:
    plain = grid.to_bytes() + bytes([odds.shape[1], low, high]) + odds.tobytes()
    return deflate(plain).numpy().tobytes(), len(plain)


def pack(levels: Levels, grid: Grid, key: int) -> bytes:
    """The part `code` of levels (o, i) on a grid."""
    o, i = levels.shape
    top = top_of(levels)
    histogram = np.zeros((CONTEXTS, top + 1), dtype=np.int64)
    found = []
    for start, stop in blocks(o, i):
        rows = np.arange(start, stop)
        found.append(grid.contexts(rows, row_thresholds(rows, i, key)))
        histogram += histogram_of(levels[start:stop], found[-1], top)
    low, high, odds = _odds(histogram)
    tables = dither.tables_of(odds)
    side, _ = _side(grid, low, high, odds)
    pieces = [struct.pack("<fI", grid.unit, len(side)), side]
    for (start, stop), contexts in zip(blocks(o, i), found, strict=True):
        symbols = (levels[start:stop].reshape(-1) + np.int8(top)).astype(np.uint8)
        words = encode_words(symbols, contexts - np.uint8((CLASSES + 1) * low), tables)
        pieces += [struct.pack("<I", len(words)), words.astype("<u4").tobytes()]
    return b"".join(pieces)


def unpack(code: bytes, shape: Shape, key: int) -> tuple[Grid, Iterator[tuple[int, torch.Tensor]]]:
    """(grid, (first row, levels (n, i) as fp32) over all rows). Raises ValueError for damage."""
    i = shape[1]
    reader = _Reader(code)
    unit = float(reader.take("<f4", 1)[0])
    frame = reader.take("u1", int(reader.take("<u4", 1)[0]))
    limit = 16 + 2 * shape[0] + i + CONTEXTS * MAX_LEVEL
    plain = inflate_any(torch.from_numpy(frame.copy()), limit)
    grid, rest = Grid.from_bytes(plain, shape, unit)
    top, low, high = rest[:3] if len(rest) >= 3 else (0, 0, 0)
    n_contexts = (CLASSES + 1) * (high - low + 1)
    if not (1 <= top <= MAX_LEVEL and low <= high < GROUPS and len(rest) == 3 + n_contexts * top):
        raise ValueError("the tables of odds are damaged")
    tables = dither.tables_of(np.frombuffer(rest, np.uint8, offset=3).reshape(-1, top))
    first = (CLASSES + 1) * low

    def coded() -> Iterator[tuple[int, torch.Tensor]]:
        for start, stop in blocks(*shape):
            words = reader.take("<u4", int(reader.take("<u4", 1)[0])).astype(np.uint32)
            rows = np.arange(start, stop)
            contexts = grid.contexts(rows, row_thresholds(rows, i, key)) - np.uint8(first)
            symbols = decode_words(words, len(contexts), contexts, tables)
            yield start, torch.from_numpy(symbols).reshape(-1, i).float().sub_(top)
        if reader.at != len(code):
            raise ValueError("the code is longer than its values")

    return grid, coded()


class _Reader:
    """Bytes taken one after the other. Raises ValueError at the end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, kind: str, count: int) -> NDArray[np.generic]:
        dtype = np.dtype(kind)
        stop = self.at + count * dtype.itemsize
        if stop > len(self.data):
            raise ValueError("the code ends too early")
        found = np.frombuffer(self.data, dtype=dtype, count=count, offset=self.at)
        self.at = stop
        return found
