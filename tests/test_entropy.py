"""Entropy coding: integer tables, words that plain integers can decode, damage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.coding.entropy import TABLE_BITS, Table, decode, encode

few = settings(deadline=None, max_examples=60)


def table_of(seen: list[int] | np.ndarray, bits: int = TABLE_BITS) -> Table:
    """Counts near the shares of `seen`, at least 1 for what occurs; the commonest takes the rest."""
    seen = np.asarray(seen, dtype=np.int64)
    if not seen.any():
        seen = np.eye(1, len(seen), dtype=np.int64)[0]
    counts = np.maximum((seen << bits) // seen.sum(), seen > 0)
    counts[counts.argmax()] += max(0, (1 << bits) - counts.sum())
    while counts.sum() > 1 << bits:
        counts[counts.argmax()] -= 1
    return Table(counts.astype(np.uint32))


def bits_of(seen: np.ndarray, table: Table) -> float:
    """Bits that symbols with this histogram cost by the odds of `table`."""
    counts = table.counts.astype(np.float64)
    return -float(seen[seen > 0] @ np.log2(counts[seen > 0] / counts.sum()))


def words_bytes(cost: float) -> int:
    """Bytes that words for so many bits need at most: the first symbol takes up to 24 bits whatever
    it costs, the last word is a whole one, and divisions lose less than 1e-5 of the cost."""
    return 4 * math.ceil((cost * (1 + 1e-5) + 24) / 32) if cost else 0


def histograms(
    symbols: np.ndarray, contexts: np.ndarray | None, n_contexts: int, n_symbols: int
) -> np.ndarray:
    """How often each symbol occurs in each context: (n_contexts, n_symbols)."""
    at = np.zeros(len(symbols), np.uint8) if contexts is None else contexts
    return np.stack([np.bincount(symbols[at == c], minlength=n_symbols) for c in range(n_contexts)])


def by_integers(words: list[int], run_lengths: list[int], tables: list[Table]) -> list[list[int]]:
    """The decoder in plain Python integers: what a stranger would write from the docstring."""
    words, state = list(words), 0
    while words and state < 1 << 32:
        state = (state << 32) | words.pop()
    runs = []
    for length, table in zip(run_lengths, tables, strict=True):
        shift = 24 - (sum(table.counts.tolist()).bit_length() - 1)
        frequencies = [count << shift for count in table.counts.tolist()]
        run = []
        for _ in range(length):
            if max(frequencies) == 1 << 24:  # one symbol: no words
                run.append(frequencies.index(1 << 24))
                continue
            low, left, symbol = state % (1 << 24), 0, 0
            while low >= left + frequencies[symbol]:
                left += frequencies[symbol]
                symbol += 1
            run.append(symbol)
            state = (state >> 24) * frequencies[symbol] + low - left
            if state < 1 << 32 and words:
                state = (state << 32) | words.pop()
        runs.append(run)
    assert state == 0 and not words
    return runs


@st.composite
def messages(draw: st.DrawFn):
    """Symbols, contexts (or None) and the tables of their histograms."""
    alphabet = draw(st.sampled_from([1, 2, 3, 4, 16, 256]))
    n_contexts = draw(st.integers(1, 4))
    n = draw(st.integers(0, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = draw(st.sampled_from([0.05, 0.5, 50.0]))
    symbols = rng.choice(alphabet, n, p=rng.dirichlet(np.full(alphabet, skew))).astype(np.uint8)
    contexts = rng.integers(0, n_contexts, n, dtype=np.uint8) if n_contexts > 1 else None
    bits = draw(st.integers(12, 16))
    seen = histograms(symbols, contexts, n_contexts, alphabet)
    return symbols, contexts, [table_of(row, bits) for row in seen]


@few
@given(messages())
def test_symbols_come_back(message):
    symbols, contexts, tables = message
    words = encode(symbols, contexts, tables)
    assert words.dtype == np.uint32
    found = decode(words, len(symbols), contexts, tables)
    assert found.dtype == np.uint8
    assert found.tolist() == symbols.tolist()


@few
@given(messages())
def test_plain_integers_decode_the_same(message):
    symbols, contexts, tables = message
    runs = [symbols.tolist()]
    if contexts is not None:
        runs = [symbols[contexts == context].tolist() for context in range(len(tables))]
    words = encode(symbols, contexts, tables).tolist()
    assert by_integers(words, [len(run) for run in runs], tables) == runs


@few
@given(messages())
def test_words_take_what_the_tables_say(message):
    symbols, contexts, tables = message
    seen = histograms(symbols, contexts, len(tables), len(tables[0].counts))
    cost = sum(bits_of(row, table) for row, table in zip(seen, tables, strict=True))
    words = encode(symbols, contexts, tables)
    assert 0 <= words_bytes(cost) - words.nbytes <= 8


@pytest.mark.parametrize("rare", [0.0005, 0.02, 0.3])
def test_long_runs_cost_their_entropy(rare: float):
    rng = np.random.default_rng(0)
    symbols = rng.choice(3, 300_000, p=[rare / 2, 1 - rare, rare / 2]).astype(np.uint8)
    seen = np.bincount(symbols, minlength=3)
    table = table_of(seen)
    share = seen / seen.sum()
    entropy = -float((seen * np.log2(share)).sum())
    words = encode(symbols, None, [table])
    assert entropy <= 8 * words.nbytes + 32
    assert bits_of(seen, table) < 1.01 * entropy
    assert 0 <= words_bytes(bits_of(seen, table)) - words.nbytes <= 8 + 2e-5 * words.nbytes
    assert np.array_equal(decode(words, len(symbols), None, [table]), symbols)


def test_words_are_pinned():
    """For ever: archives hold words. Contexts 0 and 1 have tables, 2 has a table of one symbol."""
    tables = [
        Table(np.array([1, 4090, 5], dtype=np.uint32)),
        Table(np.array([8192, 0, 8192], dtype=np.uint32)),
        Table(np.array([0, 65536, 0], dtype=np.uint32)),
    ]
    contexts = np.array([0, 1, 2, 1, 0, 0, 1, 2, 1, 0, 0, 0] * 6, dtype=np.uint8)
    symbols = np.array([1, 0, 1, 2, 1, 2, 2, 1, 2, 1, 0, 1] * 6, dtype=np.uint8)
    words = encode(symbols, contexts, tables)
    assert words.tolist() == [
        2341744640,
        2190156849,
        3108337603,
        381520736,
        2978380457,
        132880,
    ]
    assert decode(words, len(symbols), contexts, tables).tolist() == symbols.tolist()


def test_nothing_costs_nothing():
    none = np.zeros(0, dtype=np.uint8)
    table = table_of(np.zeros(4, dtype=np.int64))
    assert encode(none, None, [table]).tolist() == []
    assert decode(np.zeros(0, dtype=np.uint32), 0, None, [table]).tolist() == []
    same = np.full(1000, 3, dtype=np.uint8)
    only = table_of(np.bincount(same))
    assert encode(same, None, [only]).tolist() == []
    assert decode(np.zeros(0, dtype=np.uint32), 1000, None, [only]).tolist() == [3] * 1000


@pytest.mark.parametrize("counts", [[], [4095], [4096, 1], [1 << 17], [2**32 - 1, 4097]])
def test_other_sums_are_no_table(counts: list[int]):
    with pytest.raises(ValueError, match="sum to"):
        Table(np.array(counts, dtype=np.uint32))


def test_what_a_table_lacks_cannot_be_coded():
    table = table_of(np.array([5, 0, 3]))
    for missing in (1, 3):
        with pytest.raises(ValueError, match="does not hold"):
            encode(np.array([0, missing], dtype=np.uint8), None, [table])


def test_contexts_must_fit():
    table = table_of(np.array([5, 3]))
    symbols = np.zeros(4, dtype=np.uint8)
    with pytest.raises(ValueError, match="no contexts"):
        encode(symbols, None, [table, table])
    for contexts in ([0, 0, 0], [0, 0, 0, 2]):
        with pytest.raises(ValueError, match="do not fit"):
            encode(symbols, np.array(contexts, dtype=np.uint8), [table, table])
        with pytest.raises(ValueError, match="do not fit"):
            decode(np.zeros(0, np.uint32), 4, np.array(contexts, dtype=np.uint8), [table, table])


@few
@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 500), messages())
def test_damaged_words_never_do_worse_than_wrong_symbols(words, n: int, message):
    """Any words at all: an error that says so, or symbols of the tables' alphabet."""
    _, _, tables = message
    contexts = np.arange(n, dtype=np.int64) % len(tables) if len(tables) > 1 else None
    try:
        found = decode(
            np.array(words, dtype=np.uint32),
            n,
            None if contexts is None else contexts.astype(np.uint8),
            tables,
        )
    except ValueError as error:
        assert "damaged" in str(error)
        return
    assert len(found) == n
    for context, table in enumerate(tables):
        run = found if contexts is None else found[contexts == context]
        assert table.counts[run].all()


def test_cut_or_lengthened_words_are_noticed():
    symbols = np.random.default_rng(1).integers(0, 16, 5000).astype(np.uint8)
    table = table_of(np.bincount(symbols))
    words = encode(symbols, None, [table])
    for wrong in (np.append(words, np.uint32(1)), np.append(words, np.uint32(0)), words[1:]):
        with pytest.raises(ValueError, match="damaged"):
            decode(wrong, 5000, None, [table])
    with pytest.raises(ValueError, match="damaged"):
        decode(words, 4000, None, [table])
