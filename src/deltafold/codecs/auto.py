"""`auto`: unbiased rounding at seeded thresholds, one step for the whole model, entropy coded.

Each entry of the delta becomes a whole multiple of a step, at random but right on average
(`coding/dither.py`). Most multiples are 0 once the step is large; which places can differ from 0 at
all follows mostly from the seed, so little is spent on positions; and large entries are kept more
often than small ones. Errors are independent from entry to entry, and a model suffers far less from
those than from a systematic error of the same size. `docs/auto.md` has the evidence.

    sigma   root mean square of the matrix;     Delta = step sigma       step: one for the model
    level   l = sign(d) floor(|d| / Delta + 1 - t),      d^ = l Delta,   t from the seed

- **Rows of a vocabulary** differ in size by orders of magnitude, and a token whose row moved most
  matters most. Rows fall into groups by half octaves of their root mean square; the rows of a group
  at s have the step Delta sqrt(sigma / s): the larger the row, the finer. Used for any matrix whose
  rows differ as much.
- **With moments of the layer's inputs**, the error of each column is fed forward to the columns that
  follow, as in GPTQ (Frantar et al. 2022, arXiv 2210.17323), with
  H = E[x x^T] / mean(diag) + max(1, step / 2) I: the larger the errors, the less of them is fed on.

Layout, all little endian, for G groups of rows (1 where rows are alike):

    code  uint8   G u8 | top u8 | G x unit f32 | G x span u32
                  if G > 1:  n u32 | n bytes: a zstd frame of one byte a row, its group (G: zero)
                  odds       17 G x top bytes, context 17 g + class
                  blocks of 2^20 values or one row, whichever is more: n u32 | n words u32
    fix   uint8   only with the setting `rank`: a low-rank correction (`coding/correction.py`)

`--distill` trains the units and the correction; the levels stay.
Place p of the matrix (row major) has threshold p of the stream. Lost: everything but the levels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from deltafold.codecs.base import (
    Parts,
    PartSpec,
    Settings,
    Shape,
    Spectrum,
    VariableCodec,
    check_parts,
)
from deltafold.coding import correction, dither
from deltafold.coding.dither import CLASSES, MAX_LEVEL, THRESHOLDS, Levels
from deltafold.coding.entropy import decode as decode_words
from deltafold.coding.entropy import encode as encode_words
from deltafold.coding.planes import deflate, inflate
from deltafold.coding.trainable import Trainable
from deltafold.coding.trainable_levels import TrainableLevels
from deltafold.linalg import Factors, Moments, RowMatrix, feed_forward, feeding_factor

BLOCK_VALUES = 1 << 20
GROUPS = 15
REACH = 5.0  # sigmas up to which thresholds are told apart
UNEVEN = 0.35  # standard deviation of log2(row's root mean square) from which rows get groups
PILOT_VALUES = 1 << 17  # values that a pilot looks at, at most a twelfth of the matrix
FEED_DAMPING = 0.5  # of the step
UNSETTLED = 0.05  # change of one unit by the stored dtype's rounding, above which nothing is fed on
_HEADER_BYTES = 2 + 8 + 17 + 8


Settle = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Scales:
    """Steps of the groups of rows of one matrix."""

    units: NDArray[np.float32]  # (G,)
    spans: NDArray[np.uint32]  # (G,)
    group: NDArray[np.uint8] | None  # (o,); None: all rows in group 0. G: the row is zero

    @property
    def typical(self) -> float:
        """The step of a usual row."""
        if self.group is None:
            return float(self.units[0])
        return float(np.median(np.append(self.units, np.float32(0))[self.group]))


class Auto(VariableCodec):
    name = "auto"
    title = "seeded dither, one step for the model"
    paper = "docs/auto.md"
    uses_moments = True
    seeded = True
    value_parts = ("code", "fix")

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        """The step at which a normally distributed delta takes `share` of 16 bits a value."""
        values = shape[0] * shape[1]
        room = 16 * share * values - 8 * _HEADER_BYTES
        if room <= 0:
            return {"step": 0.0, "n_bytes": 0}
        steps, rates = _normal_rates()
        step = float(np.exp(np.interp(-np.log(room / values), -np.log(rates), np.log(steps))))
        rate = float(np.exp(np.interp(np.log(step), np.log(steps), np.log(rates))))
        n_bytes = _HEADER_BYTES + int(rate * values / 8)
        return {"step": float(f"{step:.6g}"), "n_bytes": min(n_bytes, int(2 * share * values))}

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        parts = {"code": PartSpec(torch.uint8, (int(settings["n_bytes"]),))}
        if rank := int(settings.get("rank", 0)):
            parts["fix"] = PartSpec(torch.uint8, (correction.fix_bytes(shape, rank),))
        return parts

    def encode(
        self,
        delta: RowMatrix,
        settings: Settings,
        key: int,
        factors: Factors | None = None,
        moments: Moments | None = None,
    ) -> tuple[Settings, Parts]:
        o, i = delta.shape
        step = float(settings["step"])
        scales = _scales(delta, step) if step else None
        code = b""
        if scales is not None:
            feeding = _feeding(moments, i, step)
            levels = np.empty((o, i), dtype=np.int8)
            for start, stop in _blocks(o, i):
                levels[start:stop] = _round(
                    delta.rows(start, stop),
                    np.arange(start, stop),
                    scales,
                    key,
                    feeding,
                    lambda change, at=start: delta.settle(at, change),  # type: ignore[misc]
                )
            code = _pack(levels, scales, key)
        parts = {"code": torch.from_numpy(np.frombuffer(code, dtype=np.uint8).copy())}
        if rank := int(settings.get("rank", 0)):
            size = 0.0 if scales is None else scales.typical / step
            parts["fix"] = correction.blank((o, i), rank, size, key).to_part()
        return settings | {"n_bytes": len(code)}, parts

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        code = parts["code"].numpy().tobytes()
        rank = int(settings.get("rank", 0))
        fix = correction.read(parts["fix"], shape, rank) if rank else None
        coded = (
            _unpack(code, shape, key)
            if code
            else ((start, torch.zeros(stop - start, i)) for start, stop in _blocks(o, i))
        )
        for start, rows in coded:
            yield start, rows if fix is None else rows + fix.rows(start, start + len(rows))

    def trainable(
        self, parts: Parts, settings: Settings, shape: Shape, key: int
    ) -> Trainable | None:
        code, rank = parts["code"].numpy().tobytes(), int(settings.get("rank", 0))
        if not code:
            return None
        fix = correction.read(parts["fix"], shape, rank) if rank else None
        scales, coded = _levels(code, shape, key)
        levels = torch.empty(shape, dtype=torch.int8)
        for start, rows in coded:
            levels[start : start + len(rows)] = rows

        def code_with(units: NDArray[np.float32]) -> torch.Tensor:
            data = code[:2] + units.astype("<f4").tobytes() + code[2 + 4 * len(units) :]
            return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())

        group = None if scales.group is None else torch.from_numpy(scales.group.astype(np.int64))
        return TrainableLevels(levels, torch.from_numpy(scales.units), group, fix, code_with)

    def pilot(self, delta: RowMatrix, steps: list[float], key: int) -> list[float]:
        """Bytes of the matrix's code at each step, judged from some of its rows."""
        o, i = delta.shape
        every = max(1, min(12, o * i // PILOT_VALUES))
        rows = np.arange(0, o, every)
        sample = torch.cat([delta.rows(int(row), int(row) + 1) for row in rows])
        found = []
        for step in steps:
            scales = _scales(delta, step)
            if scales is None:
                found.append(0.0)
                continue
            levels = _round(sample, rows, scales, key, None, lambda change: change)
            top = _top(levels)
            contexts = _contexts(rows, i, scales, key)
            histogram = dither.histogram_of(levels.reshape(-1), contexts, _n_contexts(scales), top)
            side = len(_side(scales, top)) + histogram.shape[0] * top + 8
            found.append(side + dither.cost_bits(histogram) / 8 * o / len(rows))
        return found


@cache
def _normal_rates() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, bits a value) of standard normal values, the threshold known; steps ascend."""
    steps = np.geomspace(0.1, 4096, 140)
    t = (np.arange(256) + 0.5) / 256
    rates = []
    for step in steps:
        # |x| >= k - 1 + t gives level k: tails of the normal distribution.
        edges = (np.arange(MAX_LEVEL)[:, None] + t) * step
        tail = torch.special.erfc(torch.from_numpy(edges / 2**0.5)).numpy()
        p = np.concatenate([1 - tail[:1], tail[:-1] - tail[1:], tail[-1:]])
        bits = np.where(p > 0, -p * np.log2(np.maximum(p, 1e-300)), 0).sum(axis=0) + tail[0]
        rates.append(bits.mean())
    return steps, np.array(rates)


def _feeding(moments: Moments | None, columns: int, step: float) -> torch.Tensor | None:
    if moments is None or moments.second.ndim != 2 or len(moments.second) != columns:
        return None
    return feeding_factor(moments, max(1.0, FEED_DAMPING * step))


def _blocks(o: int, i: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_VALUES // i)
    for start in range(0, o, step):
        yield start, min(o, start + step)


def _scales(delta: RowMatrix, step: float) -> Scales | None:
    """Steps for a matrix; None if it is zero."""
    o, i = delta.shape
    size = np.empty(o)
    for start, stop in _blocks(o, i):
        size[start:stop] = delta.rows(start, stop).double().square().mean(dim=1).sqrt().numpy()
    sigma = float(np.sqrt(np.square(size).mean()))
    if sigma < 1e-30:
        return None
    some = size[size > 0]
    if np.log2(some).std() <= UNEVEN and len(some) == o:
        spans = _spans(np.array([sigma]), np.array([step * sigma]))
        return Scales(np.array([step * sigma], dtype=np.float32), spans, None)
    lowest = int(np.floor(2 * np.log2(size.max()))) - GROUPS + 1
    with np.errstate(divide="ignore"):
        number = np.floor(2 * np.log2(size)) - lowest
    group = np.where(number >= 0, number, GROUPS).astype(np.uint8)
    middle = 2.0 ** ((np.arange(GROUPS) + lowest + 0.5) / 2)
    units = step * sigma * np.sqrt(sigma / middle)
    return Scales(units.astype(np.float32), _spans(middle, units), group)


def _spans(sizes: NDArray[np.float64], units: NDArray[np.float64]) -> NDArray[np.uint32]:
    return np.clip(THRESHOLDS * REACH * sizes / units, CLASSES, THRESHOLDS).astype(np.uint32)


def _n_contexts(scales: Scales) -> int:
    return (CLASSES + 1) * len(scales.units)


def _row_thresholds(rows: NDArray[np.int64], i: int, key: int) -> NDArray[np.uint16]:
    """Thresholds of whole rows, (n, i)."""
    if len(rows) == rows[-1] - rows[0] + 1:
        start = int(rows[0]) * i
        return dither.thresholds(key, start, start + len(rows) * i).reshape(-1, i)
    return np.stack([dither.thresholds(key, int(r) * i, int(r + 1) * i) for r in rows])


def _contexts(rows: NDArray[np.int64], i: int, scales: Scales, key: int) -> NDArray[np.uint8]:
    """Context of each place of some rows, flat. Rows that are zero take group 0 and cost nothing."""
    found = _row_thresholds(rows, i, key)
    if scales.group is None:
        return dither.classes(found, scales.spans).reshape(-1)
    group = np.minimum(scales.group[rows], GROUPS - 1)[:, None]
    classes = dither.classes(found, scales.spans[group])
    return (classes + (CLASSES + 1) * group).reshape(-1)


def _row_units(rows: NDArray[np.int64], scales: Scales) -> NDArray[np.float32]:
    """Step of each of some rows (n, 1); infinite for a row that is zero."""
    if scales.group is None:
        return np.full((len(rows), 1), scales.units[0])
    return np.append(scales.units, np.float32(np.inf))[scales.group[rows]][:, None]


def _round(
    values: torch.Tensor,
    rows: NDArray[np.int64],
    scales: Scales,
    key: int,
    feeding: torch.Tensor | None,
    settle: Settle,
) -> Levels:
    """Levels (n, i) of the delta's rows `rows`, given as `values` (n, i) fp32.

    Of the two levels around a value, the upper is taken with the probability that makes what they
    come to in the stored dtype, `settle(level x unit)`, right on average.
    """
    t = torch.from_numpy(_row_thresholds(rows, values.shape[1], key).astype(np.int32))
    rise = 1 - (t.float() + 0.5) / THRESHOLDS
    unit = torch.from_numpy(_row_units(rows, scales))
    finite = torch.where(unit.isfinite(), unit, torch.ones(()))
    x = values / unit

    def chosen(
        scaled: torch.Tensor, rises: torch.Tensor, come: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sign, size = scaled.sign(), scaled.abs().clamp_(max=MAX_LEVEL)
        low = size.floor()
        below, above = come(sign * low), come(sign * (low + 1))
        gap = (above - below).abs()
        # Steps below the spacing of the stored dtype come to the same: then the nearest will do.
        share = torch.where(gap > 0, (scaled - below) * sign / gap, (size - low).round())
        up = share + rises >= 1
        level = (sign * (low + up)).clamp_(-MAX_LEVEL, MAX_LEVEL)
        return level, torch.where(up, above, below)

    if feeding is not None:
        one = settle(finite.expand_as(x)) / finite
        if float((one - 1).abs().mean()) > UNSETTLED:
            feeding = None
    if feeding is None:
        level, _ = chosen(x, rise, lambda levels: settle(levels * finite) / finite)
        return level.to(torch.int8).numpy()
    # Fed columns are rounded one at a time; what a level comes to is taken as level x unit there.
    fed = feed_forward(x, feeding, lambda column, at: chosen(column, rise[:, at], lambda n: n))
    return fed.to(torch.int8).numpy()


def _top(levels: Levels) -> int:
    return max(1, int(np.abs(levels).max(initial=0)))


def _side(scales: Scales, top: int) -> bytes:
    """What stands before the odds."""
    head = struct.pack("<BB", len(scales.units), top)
    head += scales.units.astype("<f4").tobytes() + scales.spans.astype("<u4").tobytes()
    if scales.group is not None:
        frame = deflate(scales.group.tobytes()).numpy().tobytes()
        head += struct.pack("<I", len(frame)) + frame
    return head


def _pack(levels: Levels, scales: Scales, key: int) -> bytes:
    """The bytes of a matrix's levels."""
    o, i = levels.shape
    top, n_contexts = _top(levels), _n_contexts(scales)
    histogram = np.zeros((n_contexts, top + 1), dtype=np.int64)
    for start, stop in _blocks(o, i):
        contexts = _contexts(np.arange(start, stop), i, scales, key)
        histogram += dither.histogram_of(levels[start:stop].reshape(-1), contexts, n_contexts, top)
    odds = dither.odds_of(histogram)
    tables = dither.tables_of(odds)
    pieces = [_side(scales, top), odds.tobytes()]
    for start, stop in _blocks(o, i):
        contexts = _contexts(np.arange(start, stop), i, scales, key)
        symbols = (levels[start:stop].reshape(-1) + np.int8(top)).astype(np.uint8)
        words = encode_words(symbols, contexts, tables)
        pieces += [struct.pack("<I", len(words)), words.astype("<u4").tobytes()]
    return b"".join(pieces)


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


def _unpack(code: bytes, shape: Shape, key: int) -> Iterator[tuple[int, torch.Tensor]]:
    scales, coded = _levels(code, shape, key)
    for start, levels in coded:
        row_units = _row_units(np.arange(start, start + len(levels)), scales)
        row_units[~np.isfinite(row_units)] = 0
        yield start, levels.mul_(torch.from_numpy(row_units))


def _levels(
    code: bytes, shape: Shape, key: int
) -> tuple[Scales, Iterator[tuple[int, torch.Tensor]]]:
    """(steps, (first row, levels (n, i) as fp32) over all rows). Raises ValueError for damage."""
    o, i = shape
    reader = _Reader(code)
    groups, top = (int(number) for number in reader.take("u1", 2))
    units = reader.take("<f4", groups).astype(np.float32)
    spans = reader.take("<u4", groups).astype(np.uint32)
    if groups not in (1, GROUPS) or not 1 <= top <= MAX_LEVEL:
        raise ValueError("the code's header is damaged")
    if (spans < 1).any() or (spans > THRESHOLDS).any() or not np.isfinite(units).all():
        raise ValueError("the code's steps are damaged")
    group = None
    if groups > 1:
        size = int(reader.take("<u4", 1)[0])
        frame = torch.from_numpy(reader.take("u1", size).copy())
        group = np.frombuffer(inflate(frame, o), dtype=np.uint8)
        if int(group.max()) > groups:
            raise ValueError("a row's group is damaged")
    scales = Scales(units, spans, group)
    odds = reader.take("u1", _n_contexts(scales) * top).reshape(-1, top)
    tables = dither.tables_of(odds.astype(np.uint8))

    def coded() -> Iterator[tuple[int, torch.Tensor]]:
        for start, stop in _blocks(o, i):
            words = reader.take("<u4", int(reader.take("<u4", 1)[0])).astype(np.uint32)
            contexts = _contexts(np.arange(start, stop), i, scales, key)
            symbols = decode_words(words, len(contexts), contexts, tables)
            yield start, torch.from_numpy(symbols).reshape(-1, i).float().sub_(top)
        if reader.at != len(code):
            raise ValueError("the code is longer than its values")

    return scales, coded()


CODEC = Auto
