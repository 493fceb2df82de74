"""`context`: every bit of the fine-tune; each difference is coded by what the base weight says of it.

Source: own. How many representable values an optimiser's step crosses follows from the exponent of
the weight, which the decoder holds, and from how much its row and its column change
(`coding/contexts.py`). Weights of like expectation form a group. Where few of a group change, the
gaps between those that do are coded, under the geometric law of independent marks, and then their
differences; where many change, the difference of each weight. Differences count representable values
and are positive away from zero.

Layout: one part, `code`: head (`coding/grouping.py`), then words of an rANS stream (`coding/coder.py`):

    row and column scales                 where the head has them
    tokens of gaps                        for each group of gaps
    open bits of all gaps                 by token (`coding/tokens.py`, 8 an octave)
    tokens of differences                 for each group, under its table
    open bits of all differences          by token (4 an octave)

Lost: nothing. Any dtype, NaN payloads included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deltafold.codecs.base import ExactCodec, Parts, Settings
from deltafold.coding.coder import RunReader, RunWriter
from deltafold.coding.contexts import Classes, Order, Scaling, exponents, scaling_of
from deltafold.coding.frequencies import Frequencies, from_row, geometric_row, to_row
from deltafold.coding.grouping import Group, Head, grouped, tokens_bits, uneven_bits
from deltafold.coding.planes import bit_pattern, from_bit_pattern, ordered
from deltafold.coding.tokens import Tokens, first_value, open_bits, rests, to_tokens
from deltafold.dtypes import folded
from deltafold.lazy import torch

GAP_FINE, STEP_FINE = 3, 2
SCALED_SHARE = 0.02  # below this share of changed values, scales must promise to pay
_SCALE_BITS = 2.0  # what a scale costs at least
Values = NDArray[np.unsignedinteger]
Places = NDArray[np.int64]


class Context(ExactCodec):
    name = "context"
    title = "exact: differences, coded by the base's exponents"
    paper = "-"

    def encode(self, reference: torch.Tensor, tuned: torch.Tensor) -> tuple[Settings, Parts]:
        old, new = bit_pattern(reference), bit_pattern(tuned)
        changed = old != new
        places = np.flatnonzero(changed)
        moves = np.zeros(len(old), dtype=old.dtype)
        moves[places] = _moves(old[places], new[places], reference.dtype)
        exponent = exponents(old, reference.dtype)
        head, classes = _arranged(changed, places, moves, exponent, folded(tuple(reference.shape)))
        writer = RunWriter()
        if (scaling := head.scaling) is not None:
            for scales, row in zip((scaling.rows, scaling.columns), head.scale_rows, strict=True):
                writer.symbols(scales, from_row(row))
        _write(writer, head, classes, moves)
        code = head.to_bytes() + writer.words().astype("<u4").tobytes()
        return {}, {"code": torch.from_numpy(np.frombuffer(code, dtype=np.uint8).copy())}

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, reference: torch.Tensor
    ) -> torch.Tensor:
        head, words = Head.from_bytes(parts["code"].numpy().tobytes())
        old, shape = bit_pattern(reference), folded(tuple(reference.shape))
        reader = RunReader(words)
        classes = exponents(old, reference.dtype)
        if head.scaling is not None:
            rows, columns = (
                reader.symbols(count, from_row(row)).astype(np.int16)
                for count, row in zip(shape, head.scale_rows, strict=True)
            )
            classes = Scaling(rows, columns, head.scaling.origin).classes(classes)
        places, moves = _read(reader, head, classes, old.dtype)
        reader.end()
        if places is None:
            new = _moved(old, moves, reference.dtype)
        else:
            new = old.copy()
            new[places] = _moved(old[places], moves, reference.dtype)
        return from_bit_pattern(new, reference.dtype, tuple(reference.shape))


def _moves(old: Values, new: Values, dtype: torch.dtype) -> Values:
    """Representable values from old to new (n,), zig-zagged: even away from zero, odd towards it."""
    floating, width = dtype.is_floating_point, 8 * old.dtype.itemsize
    steps = ordered(new, floating) - ordered(old, floating)
    if floating:
        steps = _signed(steps, old)
    negative = steps.dtype.type(0) - (steps >> steps.dtype.type(width - 1))
    return (steps << steps.dtype.type(1)) ^ negative


def _moved(old: Values, moves: Values, dtype: torch.dtype) -> Values:
    """Inverse of `_moves`: the new bits."""
    one, floating = moves.dtype.type(1), dtype.is_floating_point
    steps = (moves >> one) ^ (moves.dtype.type(0) - (moves & one))
    if floating:
        steps = _signed(steps, old)
    return ordered(ordered(old, floating) + steps, floating)


def _signed(steps: Values, old: Values) -> Values:
    """Steps times the sign of the old value."""
    sign = old >> old.dtype.type(8 * old.dtype.itemsize - 1)
    return (steps ^ (old.dtype.type(0) - sign)) + sign


def _arranged(
    changed: NDArray[np.bool_],
    places: Places,
    moves: Values,
    exponent: Classes,
    shape: tuple[int, int],
) -> tuple[Head, Classes]:
    """The cheapest of the arrangements, by exponent alone or with scales; classes of all values."""
    tokens = to_tokens(moves[places], STEP_FINE)
    groups, best = grouped(*_counts(exponent, places, tokens))
    found = Head(groups), exponent
    if min(shape) < 2 or not len(places):
        return found
    matrix = changed.reshape(shape)
    dense = len(places) >= SCALED_SHARE * len(exponent)
    for by_column in (False, True):
        gain = uneven_bits(matrix.T if by_column else matrix)
        if not dense and gain < _SCALE_BITS * shape[by_column]:
            continue
        scaling = scaling_of(moves, exponent, shape, by_column)
        classes = scaling.classes(exponent)
        groups, bits = grouped(*_counts(classes, places, tokens))
        seen = [np.bincount(scales, minlength=256) for scales in (scaling.rows, scaling.columns)]
        if (bits := bits + sum(map(tokens_bits, seen))) < best:
            found = Head(groups, scaling, tuple(map(to_row, seen))), classes
            best = bits
    return found


def _counts(
    classes: Classes, places: Places, tokens: Tokens
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Values of each class (256,), and tokens of the changed ones of each (256, 256)."""
    both = (classes[places].astype(np.uint16) << 8) | tokens
    seen = np.bincount(both, minlength=1 << 16).reshape(256, 256)
    return np.bincount(classes, minlength=256), seen


def _write(writer: RunWriter, head: Head, classes: Classes, moves: Values) -> None:
    order = Order(head.lookup()[classes], len(head.groups))
    spread = order.gathered(moves)
    gaps: list[Values] = []
    rows: list[Frequencies] = []
    steps: list[Values] = []
    for number, group in enumerate(head.groups):
        of_group = order.run(number, spread)
        if group.direct:
            steps.append(of_group)
        elif group.changed:
            ranks = np.flatnonzero(of_group)
            gaps.append(np.diff(ranks, prepend=-1).astype(np.uint64) - np.uint64(1))
            rows.append(geometric_row(group.changed, int(order.sizes[number]), GAP_FINE))
            steps.append(of_group[ranks])
    _write_values(writer, gaps, rows, GAP_FINE)
    _write_values(writer, steps, _tables(head.groups), STEP_FINE)


def _tables(groups: Sequence[Group]) -> list[Frequencies]:
    """Frequencies of the differences of each group that has some. Raises ValueError if one has none."""
    tables: list[Frequencies] = []
    shared = None
    for group in groups:
        own = from_row(group.row) if len(group.row) else None
        if group.direct:
            if own is None:
                raise ValueError("a group of differences has no table")
            tables.append(own)
        elif group.changed:
            shared = shared if own is None else own
            if shared is None:
                raise ValueError("a group of differences has no table")
            tables.append(shared)
    return tables


def _write_values(
    writer: RunWriter, runs: Sequence[Values], tables: Sequence[Frequencies], fine: int
) -> None:
    """The tokens of each run under its table, then the open bits of all, by token."""
    tokens = [to_tokens(run, fine) for run in runs]
    for run, table in zip(tokens, tables, strict=True):
        writer.symbols(run, table)
    if not runs:
        return
    values = np.concatenate(list(runs))
    for token, at in _by_token(np.concatenate(tokens)):
        if width := open_bits(token, fine):
            writer.bits(rests(values[at], token, fine), width)


def _by_token(tokens: Tokens) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(token, places of it in order) of the tokens that leave bits open, ascending."""
    large = np.flatnonzero(tokens >= 16)
    if not len(large):
        return
    order = large[np.argsort(tokens[large], kind="stable")]
    found, starts = np.unique(tokens[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True)


def _read(
    reader: RunReader, head: Head, classes: Classes, dtype: np.dtype[np.unsignedinteger]
) -> tuple[Places | None, Values]:
    """(places, moves) of the values that changed; of all, without places, where many did.

    Raises ValueError for damage.
    """
    order = Order(head.lookup()[classes], len(head.groups))
    sizes = order.sizes.tolist()
    if any(group.changed > size for group, size in zip(head.groups, sizes, strict=True)):
        raise ValueError("more values changed than there are")
    sparse = [n for n, group in enumerate(head.groups) if group.changed and not group.direct]
    runs = [
        (head.groups[n].changed, geometric_row(head.groups[n].changed, sizes[n], GAP_FINE))
        for n in sparse
    ]
    gaps = _read_values(reader, runs, GAP_FINE, np.dtype(np.uint64))
    marks = [np.zeros(0, dtype=np.int64)] * len(sizes)
    for n, (count, _) in zip(sparse, runs, strict=True):
        ranks = np.cumsum(gaps[:count].astype(np.int64) + 1) - 1
        gaps = gaps[count:]
        if not 0 <= int(ranks[-1]) < sizes[n]:
            raise ValueError("changed values lie beyond the last")
        marks[n] = order.marked(n, ranks)
    filled = [n for n, group in enumerate(head.groups) if group.direct or group.changed]
    counts = [sizes[n] if head.groups[n].direct else head.groups[n].changed for n in filled]
    tables = _tables(head.groups)
    moves = _read_values(reader, list(zip(counts, tables, strict=True)), STEP_FINE, dtype)
    if len(sparse) == len(filled):
        return order.places(np.concatenate([*marks, marks[0][:0]])), moves
    spread = np.zeros(len(classes), dtype=dtype)
    for n, count in zip(filled, counts, strict=True):
        if head.groups[n].direct:
            order.put(n, moves[:count], spread)
        else:
            spread[marks[n]] = moves[:count]
        moves = moves[count:]
    return None, order.scattered(spread)


def _read_values(
    reader: RunReader,
    runs: Sequence[tuple[int, Frequencies]],
    fine: int,
    dtype: np.dtype[np.unsignedinteger],
) -> Values:
    """Inverse of `_write_values`: the values of all runs, one after the other."""
    if not runs:
        return np.zeros(0, dtype=dtype)
    tokens = np.concatenate([reader.symbols(count, table) for count, table in runs])
    values = tokens.astype(np.uint64)
    for token, at in _by_token(tokens):
        first = np.uint64(first_value(token, fine))
        values[at] = first + reader.bits(len(at), open_bits(token, fine))
    if len(values) and int(values.max()) >> (8 * dtype.itemsize):
        raise ValueError("a difference is larger than its dtype")
    return values.astype(dtype)


CODEC = Context
