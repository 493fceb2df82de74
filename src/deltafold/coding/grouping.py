"""Which classes of values are coded alike: groups, their tables, and the head of the stream that says so.

Neighbouring classes are joined where that costs less than telling them apart does (Rissanen 1978,
description length): the code of which values changed and of their tokens, and the bytes of the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import zstandard
from numpy.typing import NDArray

from deltafold.coding.contexts import Scaling
from deltafold.coding.frequencies import to_row
from deltafold.coding.planes import inflate_any
from deltafold.lazy import torch

DIRECT_SHARE = 0.25  # from this share of changed values on, all values of a group are coded
_GROUP_BITS = 28.0
_SYMBOL_BITS = 5.0  # of a table, after zstd
_MOST_HEAD = 1 << 24
_NOTHING = np.zeros(0, dtype=np.uint8)


@dataclass
class Group:
    """Values of the classes up to `last` (from the group before on), and how they are coded.

    `changed` counts them. `direct`: all are coded, else the gaps between those that changed. `row`:
    stored frequencies of tokens; empty: those of the group of gaps before.
    """

    last: int
    changed: int
    direct: bool
    row: NDArray[np.uint8] = field(default_factory=lambda: _NOTHING)


@dataclass
class Head:
    """What a stream starts with."""

    groups: list[Group]
    scaling: Scaling | None = None
    scale_rows: tuple[NDArray[np.uint8], ...] = ()  # frequencies of scales: of rows, of columns

    def to_bytes(self) -> bytes:
        """LEB128 integers and the bytes of rows, deflated where that is shorter; its length first."""
        out = bytearray()
        _put(out, len(self.groups) << 1 | (self.scaling is not None))
        if self.scaling is not None:
            _put(
                out,
                self.scaling.origin << 1
                if self.scaling.origin >= 0
                else ~(self.scaling.origin << 1),
            )
            for row in self.scale_rows:
                _put_row(out, row)
        for group in self.groups:
            out.append(group.last)
            _put(out, group.changed << 2 | group.direct << 1 | bool(len(group.row)))
            if len(group.row):
                _put_row(out, group.row)
        frame = zstandard.ZstdCompressor(level=19, write_content_size=True).compress(bytes(out))
        small = len(frame) < len(out)
        head = bytearray()
        _put(head, (len(frame) if small else len(out)) << 1 | small)
        return bytes(head) + (frame if small else bytes(out))

    @classmethod
    def from_bytes(cls, code: bytes) -> tuple[Head, NDArray[np.uint32]]:
        """The head and the words after it. Raises ValueError where it is damaged."""
        size, at = _take(code, 0)
        body = code[at : at + (size >> 1)]
        rest = code[at + (size >> 1) :]
        if len(body) != size >> 1 or len(rest) % 4:
            raise ValueError("a code is cut off")
        if size & 1:
            body = inflate_any(
                torch.from_numpy(np.frombuffer(body, dtype=np.uint8).copy()), _MOST_HEAD
            )
        count, at = _take(body, 0)
        head = cls([])
        if count & 1:
            origin, at = _take(body, at)
            first, at = _take_row(body, at)
            second, at = _take_row(body, at)
            head.scale_rows = (first, second)
            head.scaling = Scaling(_NONE, _NONE, origin >> 1 if not origin & 1 else ~(origin >> 1))
        for _ in range(count >> 1):
            if at >= len(body):
                raise ValueError("the head of a code is cut off")
            last = body[at]
            how, at = _take(body, at + 1)
            row = _NOTHING
            if how & 1:
                row, at = _take_row(body, at)
            head.groups.append(Group(last, how >> 2, bool(how & 2), row))
        lasts = [group.last for group in head.groups]
        if at != len(body) or lasts != sorted(set(lasts)) or lasts[-1:] != [255]:
            raise ValueError("the head of a code is damaged")
        return head, np.frombuffer(rest, dtype="<u4").astype(np.uint32)

    def lookup(self) -> NDArray[np.uint8]:
        """The group of each class (256,)."""
        return np.searchsorted([group.last for group in self.groups], np.arange(256)).astype(
            np.uint8
        )


_NONE = np.zeros(0, dtype=np.int16)


def grouped(totals: NDArray[np.int64], tokens: NDArray[np.int64]) -> tuple[list[Group], float]:
    """Groups of classes, and the bits that they cost in all.

    `totals` (256,): values of each class; `tokens` (256, 256): how often each token occurs among the
    changed ones of each class.
    """
    found: list[_Open] = []
    for number in np.flatnonzero(totals).tolist():
        one = _Open(number, int(totals[number]), tokens[number])
        if found and (both := found[-1].joined(one)).bits <= found[-1].bits + one.bits:
            found[-1] = both
        else:
            found.append(one)
    found = found or [_Open(255, 0, tokens[0])]
    found[-1].last = 255
    groups = [Group(each.last, each.changed, each.direct) for each in found]
    _share_tables(groups, found)
    return groups, sum(each.bits for each in found)


class _Open:
    """Classes that are coded alike, while it is not yet settled which others join them."""

    def __init__(self, last: int, count: int, tokens: NDArray[np.int64]):
        self.last, self.count, self.tokens = last, count, tokens
        self.changed = int(tokens.sum())
        self.direct = self.changed >= DIRECT_SHARE * count and count > 0
        self.bits = _GROUP_BITS + _flags_bits(count, self.changed) + tokens_bits(tokens)

    def joined(self, other: _Open) -> _Open:
        return _Open(other.last, self.count + other.count, self.tokens + other.tokens)

    def histogram(self) -> NDArray[np.int64]:
        """How often each token is coded."""
        if not self.direct:
            return self.tokens
        whole = self.tokens.copy()
        whole[0] = self.count - self.changed
        return whole


def _share_tables(groups: list[Group], found: list[_Open]) -> None:
    """One table for neighbouring groups of gaps, where that is cheaper."""
    shared: list[int] = []
    histogram = np.zeros(256, dtype=np.int64)

    def settle() -> None:
        if shared:
            groups[shared[0]].row = to_row(histogram)

    for number, each in enumerate(found):
        if each.direct:
            groups[number].row = to_row(each.histogram())
        elif each.changed:
            both = histogram + each.tokens
            if shared and tokens_bits(both) <= tokens_bits(histogram) + tokens_bits(each.tokens):
                shared.append(number)
                histogram = both
                continue
            settle()
            shared, histogram = [number], each.tokens
    settle()


def _flags_bits(count: int, marked: int) -> float:
    """n H(k / n)."""
    if not 0 < marked < count:
        return 0.0
    return float(
        np.log2(count / marked) * marked + np.log2(count / (count - marked)) * (count - marked)
    )


def uneven_bits(changed: NDArray[np.bool_]) -> float:
    """Bits that flags (o, i) cost less if the rows' shares of them are known."""
    rows, (o, i) = changed.sum(1), changed.shape
    inside = rows[(rows > 0) & (rows < i)].astype(np.float64)
    apart = inside * np.log2(i / inside) + (i - inside) * np.log2(i / (i - inside))
    return _flags_bits(o * i, int(rows.sum())) - float(apart.sum())


def tokens_bits(histogram: NDArray[np.int64]) -> float:
    """Bits of tokens under a table of their own, the table included."""
    seen = histogram[histogram > 0]
    if not len(seen):
        return 0.0
    return float((seen * np.log2(seen.sum() / seen)).sum()) + _SYMBOL_BITS * len(seen) + 8


def _put(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _take(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 63:
        value |= (data[at] & 127) << shift
        if data[at] < 128:
            return value, at + 1
        shift, at = shift + 7, at + 1
    raise ValueError("the head of a code is cut off")


def _put_row(out: bytearray, row: NDArray[np.uint8]) -> None:
    """Its length, then runs of bytes."""
    _put(out, len(row))
    out += row.tobytes()


def _take_row(data: bytes, at: int) -> tuple[NDArray[np.uint8], int]:
    size, at = _take(data, at)
    if at + size > len(data) or size > 256:
        raise ValueError("the head of a code is cut off")
    return np.frombuffer(data, dtype=np.uint8, count=size, offset=at), at + size
