"""`auto`: unbiased rounding at seeded thresholds, entropy coded; finer steps where errors cost more.

Each entry of the delta becomes a whole multiple of its step, at random but right on average
(`coding/dither.py`). Most multiples are 0 once steps are large; which places can differ from 0 at
all follows mostly from the seed, so little is spent on positions; and large entries are kept more
often than small ones. Errors are independent from entry to entry, and a model suffers far less from
those than from a systematic error of the same size. `docs/auto.md` has the evidence.

    level   l = sign(d) floor(|d| / unit + 1 - t),      d^ = l unit,      t from the seed

The unit of an entry (`coding/grid.py`) follows from one number for the model, `step`, and from what
errors cost. Where |d| < unit, the error's variance is |d| unit and its bytes go as |d| / unit; so the
least divergence F |d| unit for given bytes has a unit in proportion to F^-1/2 (F the Fisher
information of the entry, as `linalg.Fisher`: F_rj = f_r h_j):

    unit(r, j) = step sigma (sigma F^1/2)^-1/2 (f_r / f + 1/10)^-1/2 (h_j / h + 3/10)^-1/2

with sigma the root mean square of the matrix, f, h, F means over it, and both factors on the right
rounded to powers of two. The second factor is the geometric mean of the same relative step in all
matrices and the same loss per byte in all: the information is measured on a little text, and the
delta's own size tells what mattered to the fine-tune. Additions to f_r and h_j do the same in rows
and columns. Vectors that cost more bytes than they save are left out.

- **Without the information** (a model that cannot be run, `--calibration none`, `uniform`):
  unit = step sigma, and where rows differ by orders of magnitude, as those of a vocabulary do,
  step sigma sqrt(sigma / s) for a row of size s.
- **With full moments of the layer's inputs**, the error of each column is fed forward to the columns
  that follow, as in GPTQ (Frantar et al. 2022, arXiv 2210.17323), with
  H = E[x x^T] / mean(diag) + max(1, step / 2) I: the larger the errors, the less of them is fed on.

Layout, all little endian:

    code  uint8   unit f32 | n u32 | n bytes: a zstd frame:
                      the grid (`coding/grid.py`) | top u8 | lowest group u8 | highest group u8
                      odds, 17 x top bytes for each group from lowest to highest
                  blocks of 2^20 values or one row, whichever is more: n u32 | n words u32
    fix   uint8   only with the setting `rank`: a low-rank correction (`coding/correction.py`)

`--steps` trains the unit and the correction; the levels stay.
Place p of the matrix (row major) has threshold p of the stream. Lost: everything but the levels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from deltafold.codecs.base import (
    Config,
    Parts,
    PartSpec,
    Settings,
    Shape,
    Spectrum,
    VariableCodec,
    check_parts,
)
from deltafold.codecs.steps import RowSizes, grid_for, normal_rate, normal_rates, row_sizes
from deltafold.coding import correction, dither
from deltafold.coding.dither import MAX_LEVEL, THRESHOLDS, Levels
from deltafold.coding.grid import Grid
from deltafold.coding.levels import (
    blocks,
    histogram_of,
    pack,
    row_thresholds,
    side_bytes,
    top_of,
    unpack,
)
from deltafold.coding.trainable import Trainable
from deltafold.coding.trainable_levels import TrainableLevels
from deltafold.errors import UsageError
from deltafold.lazy import torch
from deltafold.linalg.matrices import Factors, Moments, RowMatrix, feed_forward, feeding_factor
from deltafold.running.devices import put

PILOT_VALUES = 1 << 17  # values that a pilot looks at, at most a twelfth of the matrix
FEED_DAMPING = 0.5  # of the step
UNSETTLED = 0.05  # change of one unit by the stored dtype's rounding, above which nothing is fed on
_HEADER_BYTES = 40  # of a matrix without vectors, about

Settle: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


@dataclass(frozen=True)
class AutoConfig(Config):
    """`uniform`: the same step, relative to its size, in every matrix."""

    uniform: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uniform not in (False, True):
            raise UsageError(f"uniform must be true or false, not {self.uniform!r}.")


class Auto(VariableCodec):
    name = "auto"
    title = "seeded dither, fine where errors cost most"
    paper = "docs/auto.md"
    uses_moments = True
    uses_fisher = True
    seeded = True
    value_parts = ("code", "fix")
    Config = AutoConfig

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        """The step at which a normally distributed delta takes `share` of 16 bits a value."""
        values = shape[0] * shape[1]
        room = 16 * share * values - 8 * _HEADER_BYTES
        if room <= 0:
            return {"step": 0.0, "n_bytes": 0}
        steps, rates = normal_rates()
        step = float(np.exp(np.interp(-np.log(room / values), -np.log(rates), np.log(steps))))
        n_bytes = _HEADER_BYTES + int(normal_rate(step) * values / 8)
        return {"step": float(f"{step:.6g}"), "n_bytes": min(n_bytes, int(2 * share * values))}

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        parts = {"code": PartSpec("U8", (int(settings["n_bytes"]),))}
        if rank := int(settings.get("rank", 0)):
            parts["fix"] = PartSpec("U8", (correction.fix_bytes(shape, rank),))
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
        grid = self._grid(delta, step) if step else None
        code = b""
        if grid is not None:
            feeding = _feeding(moments, i, step)
            levels = np.empty((o, i), dtype=np.int8)
            for start, stop in blocks(o, i):
                rows = np.arange(start, stop)
                levels[start:stop] = _round(
                    put(delta.rows(start, stop)),
                    rows,
                    grid,
                    _rise(row_thresholds(rows, i, key)),
                    feeding,
                    lambda change, at=start: delta.settle(at, change),  # type: ignore[misc]
                )
            code = pack(levels, grid, key)
        parts = {"code": _as_part(code)}
        if rank := int(settings.get("rank", 0)):
            size = 0.0 if grid is None else float(grid.unit) / step
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
            _restored(code, shape, key)
            if code
            else (
                (start, torch.zeros(stop - start, i, dtype=torch.float32, device="cpu"))
                for start, stop in blocks(o, i)
            )
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
        grid, coded = unpack(code, shape, key)
        levels = torch.empty(shape, dtype=torch.int8, device="cpu")
        for start, rows in coded:
            levels[start : start + len(rows)] = rows

        def code_with(factor: float) -> torch.Tensor:
            return _as_part(struct.pack("<f", float(grid.unit) * factor) + code[4:])

        row_units = grid.row_units(np.arange(shape[0]))
        return TrainableLevels(levels, row_units, grid.column_units(shape[1]), fix, code_with)

    def pilot(self, delta: RowMatrix, steps: list[float], key: int) -> list[float]:
        """Bytes of the matrix's code at each step, judged from some of its rows."""
        o, i = delta.shape
        every = max(1, min(12, o * i // PILOT_VALUES))
        rows = np.arange(0, o, every)
        sample = torch.cat([delta.rows(int(row), int(row) + 1) for row in rows])
        thresholds = row_thresholds(rows, i, key)
        sizes, found = row_sizes(delta), []
        values, rise = put(sample), _rise(thresholds)
        for step in steps:
            grid = self._grid(delta, step, sizes)
            if grid is None:
                found.append(0.0)
                continue
            levels = _round(values, rows, grid, rise, None, lambda change: change)
            histogram = histogram_of(levels, grid.contexts(rows, thresholds), top_of(levels))
            value_bytes = dither.cost_bits(histogram) / 8 * o / len(rows)
            found.append(side_bytes(grid, histogram) + value_bytes)
        return found

    def _grid(self, delta: RowMatrix, step: float, sizes: RowSizes | None = None) -> Grid | None:
        assert isinstance(self.config, AutoConfig)
        return grid_for(delta, step, self.config.uniform, sizes)


def _as_part(code: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(code, dtype=np.uint8).copy())


def _feeding(moments: Moments | None, columns: int, step: float) -> torch.Tensor | None:
    if moments is None or moments.second.ndim != 2 or len(moments.second) != columns:
        return None
    return feeding_factor(moments, max(1.0, FEED_DAMPING * step))


def _restored(code: bytes, shape: Shape, key: int) -> Iterator[tuple[int, torch.Tensor]]:
    grid, coded = unpack(code, shape, key)
    columns = grid.column_units(shape[1])
    for start, levels in coded:
        units = grid.row_units(np.arange(start, start + len(levels)))
        yield start, levels.mul_(units).mul_(columns)


def _rise(thresholds: NDArray[np.uint16]) -> torch.Tensor:
    """1 - t of each threshold, fp32, where heavy steps compute."""
    t = put(torch.from_numpy(thresholds.astype(np.int32)))
    return 1 - (t.float() + 0.5) / THRESHOLDS


def _round(
    values: torch.Tensor,
    rows: NDArray[np.int64],
    grid: Grid,
    rise: torch.Tensor,
    feeding: torch.Tensor | None,
    settle: Settle,
) -> Levels:
    """Levels (n, i) of the delta's rows `rows`, given as `values` (n, i) fp32, with their `rise`.

    Of the two levels around a value, the upper is taken with the probability that makes what they
    come to in the stored dtype, `settle(level x unit)`, right on average.
    """
    row_units, column_units = put(grid.row_units(rows)), put(grid.column_units(values.shape[1]))
    units = row_units * column_units

    if feeding is not None and float((settle(units) / units - 1).abs().mean()) > UNSETTLED:
        feeding = None
    if feeding is None:
        level, _ = _chosen(values / units, rise, lambda levels: settle(levels * units) / units)
        return level.to(torch.int8).cpu().numpy()

    # Fed columns are rounded one at a time; what a level comes to is taken as level x unit there.
    def rounded(column: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        factor = float(column_units[at])
        level, _ = _chosen(column / factor, rise[:, at], lambda levels: levels)
        return level, level * factor

    fed = feed_forward(values / row_units, put(feeding), rounded)
    return fed.to(torch.int8).cpu().numpy()


def _chosen(
    scaled: torch.Tensor, rise: torch.Tensor, come: Settle
) -> tuple[torch.Tensor, torch.Tensor]:
    """(level, what it comes to) of values in units; `rise` is 1 - t."""
    sign, size = scaled.sign(), scaled.abs().clamp_(max=MAX_LEVEL)
    low = size.floor()
    below, above = come(sign * low), come(sign * (low + 1))
    gap = (above - below).abs()
    # Steps below the spacing of the stored dtype come to the same: then the nearest will do.
    share = torch.where(gap > 0, (scaled - below) * sign / gap, (size - low).round())
    up = share + rise >= 1
    level = (sign * (low + up)).clamp_(-MAX_LEVEL, MAX_LEVEL)
    return level, torch.where(up, above, below)


CODEC = Auto
