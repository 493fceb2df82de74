"""Probabilities that a coder of symbols uses: integers that sum to 2^24, the same on every machine.

Two kinds. A *stored* row has one byte a symbol: 0 for one that does not occur, else b for a weight of
2^((b - 255) / 8), which is within 4.5 % of any frequency, so that it costs less than 0.001 bits a
symbol. A *geometric* row follows from how many of how many values are marked: the gap between marks
that fall independently is geometric (Golomb 1966). It is made by IEEE products of doubles and
comparisons alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltafold.coding.tokens import DIRECT, token_count

PRECISION = 24
Frequencies = NDArray[np.int64]
_EIGHTHS = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)
"""2^16 * 2^(n / 8), rounded."""


def to_row(histogram: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The stored row of a histogram (k,), without the symbols that do not occur at its end."""
    occurs = np.flatnonzero(histogram)
    if not len(occurs):
        return np.zeros(0, dtype=np.uint8)
    counts = histogram[: occurs[-1] + 1].astype(np.int64)
    ratio = (counts << 32) // counts.max()
    levels = np.searchsorted(_BETWEEN, ratio, side="right") + 1
    return np.where(counts > 0, levels, 0).astype(np.uint8)


_WEIGHTS = [0] + [_EIGHTHS[(b - 255) % 8] << ((b - 255) // 8 + 32) for b in range(1, 256)]
_BETWEEN = np.array([(a + b) >> 17 for a, b in itertools.pairwise(_WEIGHTS[1:])], dtype=np.int64)
"""Where a ratio, in units of 2^-32, is nearer to the weight of the next level."""


def from_row(row: NDArray[np.uint8]) -> Frequencies:
    """Frequencies (k,) of a stored row: 0 where it is 0, else at least 1. Raises ValueError if all are 0."""
    if not row.any():
        raise ValueError("a row of frequencies without a symbol")
    return _filled([_WEIGHTS[b] for b in row.tolist()])


def geometric_row(marked: int, count: int, fine: int) -> Frequencies:
    """Frequencies of the tokens of gaps between `marked` of `count` values, 0 < marked <= count."""
    tokens = token_count(count - marked, fine)
    miss = (count - marked) / count
    powers = [miss]  # miss^(2^e)
    while 1 << len(powers) <= count:
        powers.append(powers[-1] * powers[-1])
    parts = 1 << fine
    tails = [np.multiply.accumulate(np.array([1.0] + [miss] * (DIRECT - 1)))]
    for octave in range(DIRECT.bit_length() - 1, len(powers)):
        steps = np.array([powers[octave]] + [powers[octave - fine]] * (parts - 1))
        tails.append(np.multiply.accumulate(steps))
    tail = np.concatenate([*tails, np.zeros(1)])
    if tokens >= len(tail):
        raise ValueError("gaps between values that are too many")
    chance = np.append(tail[:tokens], 0.0)
    weights = ((chance[:-1] - chance[1:]) * 2.0**36).astype(np.int64)
    weights = np.maximum(weights, 1)
    out = weights * ((1 << PRECISION) - tokens) // weights.sum() + 1
    out[out.argmax()] += (1 << PRECISION) - out.sum()
    return out


def _filled(weights: Sequence[int]) -> Frequencies:
    """Frequencies in proportion to integer weights, at least 1 where they are; the largest takes the rest."""
    alive = sum(1 for weight in weights if weight)
    total, room = sum(weights), (1 << PRECISION) - alive
    out = [weight * room // total + 1 if weight else 0 for weight in weights]
    out[out.index(max(out))] += (1 << PRECISION) - sum(out)
    return np.array(out, dtype=np.int64)


def cost_bits(histogram: NDArray[np.integer], frequencies: Frequencies) -> float:
    """Bits of symbols with this histogram (k,); infinite if one has frequency 0."""
    occurs = np.flatnonzero(histogram)
    if not len(occurs):
        return 0.0
    if occurs[-1] >= len(frequencies) or not frequencies[occurs].all():
        return float("inf")
    return float(np.dot(histogram[occurs], PRECISION - np.log2(frequencies[occurs])))
