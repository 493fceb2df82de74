"""Entropy coding of symbols from small alphabets (codes of a quantiser), near the entropy.

Symbols are coded by rANS (`coding/coder.py`) with the probabilities in tables of integers that are
stored; also below one bit a symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafold.coding.coder import RunReader, RunWriter
from deltafold.coding.frequencies import PRECISION, Frequencies

Symbols = NDArray[np.uint8]
Words = NDArray[np.uint32]
TABLE_BITS = 14
_SUMS = tuple(1 << bits for bits in range(12, 17))


@dataclass(frozen=True, eq=False)
class Table:
    """How often each symbol is to be expected: counts (k,), k <= 256, that sum to 2^12 .. 2^16.

    A symbol with count 0 cannot be coded. Raises ValueError for any other sum.
    """

    counts: NDArray[np.uint32]

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or len(self.counts) > 256 or self.counts.dtype != np.uint32:
            raise ValueError("a table is a row of at most 256 counts, uint32")
        total = int(self.counts.sum(dtype=np.uint64))
        if total not in _SUMS:
            raise ValueError(f"the counts of a table sum to 2^12 to 2^16, not {total}")

    @property
    def bits(self) -> int:
        """log2 of the sum of the counts."""
        return int(self.counts.sum()).bit_length() - 1

    @property
    def frequencies(self) -> Frequencies:
        """Counts * 2^24 / their sum (k,): exactly."""
        return self.counts.astype(np.int64) << (PRECISION - self.bits)


def encode(symbols: Symbols, contexts: NDArray[np.uint8] | None, tables: Sequence[Table]) -> Words:
    """Words of `symbols` (n,), each coded with the table that `contexts` (n,) names.

    The symbols of one context are coded as one run. Without contexts all use the first table.
    Raises ValueError if a symbol has count 0 in its table.
    """
    _check_contexts(len(symbols), contexts, tables)
    writer = RunWriter()
    for context, at in _runs(len(symbols), contexts, len(tables)):
        writer.symbols(symbols[at], tables[context].frequencies)
    return writer.words()


def decode(
    words: Words, n: int, contexts: NDArray[np.uint8] | None, tables: Sequence[Table]
) -> Symbols:
    """Inverse of `encode` for n symbols. Raises ValueError if the words are not used up exactly."""
    _check_contexts(n, contexts, tables)
    reader = RunReader(words)
    out = np.zeros(n, dtype=np.uint8)
    for context, at in _runs(n, contexts, len(tables)):
        count = n if isinstance(at, slice) else len(at)
        out[at] = reader.symbols(count, tables[context].frequencies)
    reader.end()
    return out


def _runs(
    n: int, contexts: NDArray[np.uint8] | None, n_contexts: int
) -> list[tuple[int, slice | NDArray[np.int64]]]:
    """(context, places of its symbols in order) of the contexts that occur, ascending."""
    if contexts is None:
        return [(0, slice(0, n))]
    counts = np.bincount(contexts, minlength=n_contexts)
    order = np.argsort(contexts, kind="stable")  # of bytes: a radix sort, one pass for all
    places = np.split(order, np.cumsum(counts)[:-1])
    return [(int(context), places[context]) for context in np.flatnonzero(counts)]


def _check_contexts(n: int, contexts: NDArray[np.uint8] | None, tables: Sequence[Table]) -> None:
    if contexts is None:
        if len(tables) != 1:
            raise ValueError(f"{len(tables)} tables, but no contexts to choose between them")
    elif len(contexts) != n or (n and int(contexts.max()) >= len(tables)):
        raise ValueError(f"contexts do not fit {n} symbols and {len(tables)} tables")
