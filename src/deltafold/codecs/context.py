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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafold.codecs.base import ExactCodec, Parts, Settings
from deltafold.coding.coder import RunReader, RunWriter
from deltafold.coding.contexts import Classes, Scaling, exponents, group_order, scaling_of
from deltafold.coding.frequencies import Frequencies, from_row, geometric_row, to_row
from deltafold.coding.grouping import Group, Head, grouped, tokens_bits
from deltafold.coding.planes import bit_pattern, from_bit_pattern, ordered
from deltafold.coding.tokens import Tokens, first_value, open_bits, rests, to_tokens
from deltafold.dtypes import folded
from deltafold.lazy import torch

GAP_FINE, STEP_FINE = 3, 2
SCALED_SHARE = 0.02  # below this share of changed values, scales cost more than they say
Values = NDArray[np.unsignedinteger]
Places = NDArray[np.int32]


class Context(ExactCodec):
    name = "context"
    title = "exact: differences, coded by the base's exponents"
    paper = "-"

    def encode(self, reference: torch.Tensor, tuned: torch.Tensor) -> tuple[Settings, Parts]:
        old, new = bit_pattern(reference), bit_pattern(tuned)
        places = np.flatnonzero(old != new)
        moves = _moves(old[places], new[places], reference.dtype)
        exponent = exponents(old, reference.dtype)
        head, classes = _arranged(places, moves, exponent, folded(tuple(reference.shape)))
        writer = RunWriter()
        if head.scaling is not None:
            scales = np.concatenate([head.scaling.rows, head.scaling.columns])
            writer.symbols(scales, from_row(head.scale_row))
        _write(writer, head, classes, places, moves)
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
            scales = reader.symbols(sum(shape), from_row(head.scale_row)).astype(np.int16)
            scaling = Scaling(scales[: shape[0]], scales[shape[0] :], head.scaling.origin)
            classes = scaling.classes(classes)
        places, moves = _read(reader, head, classes, old.dtype)
        reader.end()
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
    places: NDArray[np.int64], moves: Values, exponent: Classes, shape: tuple[int, int]
) -> tuple[Head, Classes]:
    """The cheaper of the two arrangements, by exponent alone or with scales; classes of all values."""
    tokens = to_tokens(moves, STEP_FINE)
    groups, bits = grouped(*_counts(exponent, places, tokens))
    plain = Head(groups), exponent
    if len(places) < SCALED_SHARE * len(exponent) or min(shape) < 2:
        return plain
    scaling = scaling_of(places, moves, exponent, shape)
    classes = scaling.classes(exponent)
    groups, scaled_bits = grouped(*_counts(classes, places, tokens))
    seen = np.bincount(np.concatenate([scaling.rows, scaling.columns]), minlength=256)
    if scaled_bits + tokens_bits(seen) >= bits:
        return plain
    return Head(groups, scaling, to_row(seen)), classes


def _counts(
    classes: Classes, places: NDArray[np.int64], tokens: Tokens
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Values of each class (256,), and tokens of the changed ones of each (256, 256)."""
    both = (classes[places].astype(np.int64) << 8) | tokens
    seen = np.bincount(both, minlength=1 << 16).reshape(256, 256)
    return np.bincount(classes, minlength=256), seen


def _write(
    writer: RunWriter, head: Head, classes: Classes, places: NDArray[np.int64], moves: Values
) -> None:
    order, bounds = group_order(head.lookup()[classes], len(head.groups))
    spread = np.zeros(len(classes), dtype=moves.dtype)
    spread[places] = moves
    spread = spread[order]
    gaps: list[Values] = []
    steps: list[Values] = []
    for number, group in enumerate(head.groups):
        of_group = spread[bounds[number] : bounds[number + 1]]
        if group.direct:
            steps.append(of_group)
            continue
        marks = np.flatnonzero(of_group)
        gaps.append(np.diff(marks, prepend=-1).astype(np.uint64) - np.uint64(1))
        steps.append(of_group[marks])
    counts = np.diff(bounds).tolist()
    rows = [
        geometric_row(group.changed, count, GAP_FINE)
        for group, count in zip(head.groups, counts, strict=True)
        if not group.direct and group.changed
    ]
    _write_values(writer, [gap for gap in gaps if len(gap)], rows, GAP_FINE)
    _write_values(writer, [s for s in steps if len(s)], _tables(head.groups), STEP_FINE)


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
    values, of_all = np.concatenate(list(runs)), np.concatenate(tokens)
    for token, at in _by_token(of_all):
        if width := open_bits(token, fine):
            writer.bits(rests(values[at], token, fine), width)


def _by_token(tokens: Tokens) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(token, places of it in order) of the tokens that leave bits open, ascending."""
    large = np.flatnonzero(tokens >= 16)
    order = large[np.argsort(tokens[large], kind="stable")]
    found, starts = np.unique(tokens[order], return_index=True)
    for token, at in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        yield token, at


def _read(
    reader: RunReader, head: Head, classes: Classes, dtype: np.dtype[np.unsignedinteger]
) -> tuple[Places, Values]:
    """(places, moves) of all values that may have changed. Raises ValueError for damage."""
    order, bounds = group_order(head.lookup()[classes], len(head.groups))
    counts = np.diff(bounds).tolist()
    marked = [
        (group, count) for group, count in zip(head.groups, counts, strict=True)
        if group.direct or group.changed
    ]  # fmt: skip
    if any(group.changed > count for group, count in marked):
        raise ValueError("more values changed than there are")
    sparse = [(g.changed, geometric_row(g.changed, n, GAP_FINE)) for g, n in marked if not g.direct]
    gaps = _read_values(reader, sparse, GAP_FINE, np.dtype(np.uint64))
    sizes = [count if group.direct else group.changed for group, count in marked]
    filled = [size for size in sizes if size]
    tables = [t for t, size in zip(_tables(head.groups), sizes, strict=True) if size]
    moves = _read_values(reader, list(zip(filled, tables, strict=True)), STEP_FINE, dtype)
    places, done = [np.zeros(0, dtype=np.int32)], 0
    for number, group in enumerate(head.groups):
        of_group = order[bounds[number] : bounds[number + 1]]
        if group.direct:
            places.append(of_group)
        elif group.changed:
            at = np.cumsum(gaps[done : done + group.changed] + np.uint64(1)) - np.uint64(1)
            if int(at[-1]) >= len(of_group):
                raise ValueError("changed values lie beyond the last")
            places.append(of_group[at.astype(np.int64)])
            done += group.changed
    return np.concatenate(places), moves


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
