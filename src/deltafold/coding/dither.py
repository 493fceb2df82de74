"""Levels found at seeded random thresholds, and their entropy coding.

A value x (in units of the quantiser's step) becomes sign(x) floor(|x| + 1 - t), with t in (0, 1)
from the tensor's seeded stream: |x| = 0.2 becomes 1 where t <= 0.2, otherwise 0, so the level is
right on average (Roberts 1962; Gray and Neuhoff 1998, section V). The decoder derives the same t,
and knows with it where a level can hardly differ from 0: where t is far above what |x| reaches. The
smaller the values against the step, the fewer places are left to code. Hence contexts by t:

    class of a place = floor(16 t / span), and 16 where t >= span         17 classes a row group

with one small table of probabilities each. Levels of either sign are equally likely.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from deltafold.coding.counter import random_u64
from deltafold.coding.entropy import TABLE_BITS, Table

Levels = NDArray[np.int8]
Thresholds = NDArray[np.uint16]

THRESHOLDS = 1 << 16
CLASSES = 16  # of places below the span; one more for those above
MAX_LEVEL = 60


def thresholds(key: int, start: int, stop: int) -> Thresholds:
    """16-bit thresholds of places [start, stop) of a stream, four from each 64-bit integer.

    Threshold k stands for t = (k + 1/2) / 65536.
    """
    first = start // 4
    words = random_u64(key, first, -(-stop // 4))
    return words.astype("<u8", copy=False).view("<u2")[start - 4 * first : stop - 4 * first]


@cache
def _count_of(code: int) -> int:
    """floor(2^(13 (code - 1) / 254)) for code 1 to 255, by integers; 0 for code 0.

    Counts of one level, of a table that sums to 2^14: 255 of them, each 3.6 % above the last.
    """
    if code == 0:
        return 0
    power, low, high = 1 << ((TABLE_BITS - 1) * (code - 1)), 1, 1 << TABLE_BITS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**254 <= power else (low, middle)
    return low


def odds_of(histogram: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Codes (n, K) of the counts of levels 1 .. K, from histograms (n, K + 1) of |level|.

    Rounded to the nearest code, at least 1 for a level that occurs; then lowered, commonest first,
    until half of the table holds them all and level 0 keeps a count.
    """
    counts = np.array([_count_of(code) for code in range(256)])
    total = np.maximum(1, histogram.sum(axis=1, keepdims=True))
    wanted = histogram[:, 1:] / (2 * total) * (1 << TABLE_BITS)
    codes = np.searchsorted(counts[1:], np.maximum(wanted, 1), side="right").astype(np.int64)
    upper = np.minimum(codes + 1, 255)
    codes = np.where(counts[upper] - wanted < wanted - counts[codes], upper, codes)
    codes = np.where(histogram[:, 1:] > 0, codes, 0)
    half = (1 << (TABLE_BITS - 1)) - 1
    for row in codes:
        while counts[row].sum() > half:
            row[np.argmax(row)] -= 1
    return codes.astype(np.uint8)


def tables_of(odds: NDArray[np.uint8]) -> list[Table]:
    """Tables over the symbols level + K, from odds (n, K). Raises ValueError if there are none."""
    made = []
    for row in odds:
        counts = [_count_of(int(code)) for code in row]
        zero = (1 << TABLE_BITS) - 2 * sum(counts)
        if zero <= 0:
            raise ValueError("a table leaves nothing to level 0")
        made.append(Table(np.array([*counts[::-1], zero, *counts], dtype=np.uint32)))
    return made


def histogram_of(
    levels: Levels, contexts: NDArray[np.uint8], n_contexts: int, top: int
) -> NDArray[np.int64]:
    """How often each |level| 0 .. top occurs in each context: (n_contexts, top + 1)."""
    flat = contexts.astype(np.int64) * (top + 1) + np.abs(levels)
    return np.bincount(flat, minlength=n_contexts * (top + 1)).reshape(n_contexts, top + 1)


def cost_bits(histogram: NDArray[np.int64]) -> float:
    """Bits that levels with these histograms (n, K + 1) of |level| cost, signs included."""
    total = histogram.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(histogram > 0, -np.log2(histogram / total), 0.0)
    return float((histogram * bits).sum() + histogram[:, 1:].sum())
