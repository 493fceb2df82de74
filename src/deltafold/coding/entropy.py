"""Entropy coding of symbols from small alphabets (levels of a quantiser): rANS.

Asymmetric numeral systems (rANS, Duda 2013) by the library `constriction`, with the probabilities
in tables of integers that are stored. Near the entropy, also below one bit a symbol.

Why the symbols are the same on every machine: decoding rests on integers only. A coder's state is
64 bits, its words 32, and a symbol s has a frequency f_s, the f summing to 2^24. Decoding takes

    q = state mod 2^24;  s such that left_s <= q < left_s + f_s;  left_s = f_0 + ... + f_(s-1)
    state = floor(state / 2^24) f_s + q - left_s;  if state < 2^32: state = 2^32 state + next word

with words taken from the last to the first. The library wants floats and turns p_0 .. p_(k-1) into
left_s = s + floor((p_0 + ... + p_(s-1)) (2^24 - k) / sum(p)). Given p_s = f_s - 1, an integer below
2^24, each sum is an integer below 2^24 too, so exact in any float; sum(p) = 2^24 - k, the factor is
exactly 1, and left_s is the integer wanted. No rounding happens anywhere. The tests decode with
plain integers and pin words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import constriction
import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.uint8]
Words = NDArray[np.uint32]
_PRECISION = 24  # bits of the library's probabilities
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


def encode(symbols: Symbols, contexts: NDArray[np.uint8] | None, tables: Sequence[Table]) -> Words:
    """Words of `symbols` (n,), each coded with the table that `contexts` (n,) names.

    The symbols of one context are coded as one run. Without contexts all use the first table.
    Raises ValueError if a symbol has count 0 in its table.
    """
    _check_contexts(len(symbols), contexts, tables)
    coder = constriction.stream.stack.AnsCoder()
    runs = _runs(len(symbols), contexts, len(tables))
    for context, at in reversed(runs):  # a stack: what is decoded first goes on last
        run = symbols[at]
        alphabet = np.flatnonzero(tables[context].counts)  # the library's models know no zeros
        rank = np.full(256, -1, dtype=np.int32)
        rank[alphabet] = np.arange(len(alphabet))
        ranks = rank[run]
        if (ranks < 0).any():
            raise ValueError(f"a symbol that the table of context {context} does not hold")
        if len(alphabet) > 1 and len(run):
            coder.encode_reverse(ranks, _model(tables[context]))
    return coder.get_compressed()


def decode(
    words: Words, n: int, contexts: NDArray[np.uint8] | None, tables: Sequence[Table]
) -> Symbols:
    """Inverse of `encode` for n symbols. Raises ValueError if the words are not used up exactly."""
    _check_contexts(n, contexts, tables)
    if len(words) and words[-1] == 0:
        raise ValueError("entropy-coded words are damaged: the last word is zero")
    coder = constriction.stream.stack.AnsCoder(np.ascontiguousarray(words, dtype=np.uint32))
    out = np.zeros(n, dtype=np.uint8)
    for context, at in _runs(n, contexts, len(tables)):
        count = n if isinstance(at, slice) else len(at)
        out[at] = _decode_run(coder, tables[context], count)
    if not coder.is_empty():
        raise ValueError("entropy-coded words are damaged: some are left over")
    return out


def _decode_run(coder: constriction.stream.stack.AnsCoder, table: Table, count: int) -> Symbols:
    """The next `count` symbols, all of one context. A table of one symbol takes no words."""
    alphabet = np.flatnonzero(table.counts).astype(np.uint8)
    if len(alphabet) == 1:
        return np.full(count, alphabet[0], dtype=np.uint8)
    return alphabet[coder.decode(_model(table), count)]


def _model(table: Table) -> constriction.stream.model.Categorical:
    """The library's model with frequencies counts * 2^24 / sum, exactly (see above)."""
    counts = table.counts[table.counts > 0].astype(np.int64)
    frequencies = counts << (_PRECISION - table.bits)
    return constriction.stream.model.Categorical(
        (frequencies - 1).astype(np.float32), perfect=False
    )


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
