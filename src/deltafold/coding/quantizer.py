"""Group quantisers: few bits a value, one scale for each run of values.

Values are taken in the order in which they are stored. Each run of `group` consecutive values (the
last may be shorter) has one 16-bit scale, and each value one code of w bits:

    symmetric    value ~ (code - (2^w - 1) / 2) * scale * unit     mid-rise: no level at zero
    asymmetric   value ~ (code - zero) * scale * unit              zero: a code, one a group

`unit` is one power of two for all groups. It moves the scales to where 16 bits serve them, so that
deltas of 1e-8 do not underflow, and costs no rounding.

Scales are not the largest value divided by the levels: that wastes levels on outliers. The scale
(rounded to its 16 bits) with the least squared error is searched for: a coarse sweep over shrunken
ranges, a fine one about the best, then least squares for the codes found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deltafold.dtypes import DTYPES
from deltafold.lazy import torch

COARSE = (1.0, 0.88, 0.76, 0.64, 0.52, 0.4, 0.3, 0.2)  # of the full range
FINE = (0.91, 0.94, 0.97, 1.03, 1.06, 1.09)  # of the best coarse one
_PEAK_EXPONENT = 13  # values / unit lie below 2^14: scales below 2^15, fp16 goes to 65504
_CHUNK_VALUES = 1 << 20  # values fitted at once


@dataclass(frozen=True)
class Grid:
    """How values are quantised: bits a code, values a scale, kind of grid, dtype of the scales."""

    width: int
    group: int = 128
    symmetric: bool = True
    dtype_name: str = "F16"

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 8:
            raise ValueError(f"a code has 1 to 8 bits, not {self.width}")
        if self.group < 1:
            raise ValueError(f"a group has at least one value, not {self.group}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return DTYPES[self.dtype_name]

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.width) - 1

    def groups(self, count: int) -> int:
        """Groups of `count` values."""
        return -(-count // self.group)


class Groups(NamedTuple):
    """What all values of a group share, for every group; and `unit`, which all groups share."""

    scales: torch.Tensor  # (groups,) grid.dtype
    zeros: torch.Tensor | None  # (groups,) uint8 codes; None if symmetric
    unit: float  # a power of two


def fit_groups(values: torch.Tensor, grid: Grid, weights: torch.Tensor | None = None) -> Groups:
    """Scales (and zeros) of least squared error for fp32 `values` (n,), group by group.

    `weights` (n,), not negative, weigh the squared errors, such as by E[x_j^2] of the input that a
    value meets.
    """
    unit = _unit(values)
    scales = [torch.zeros(0, dtype=grid.dtype, device="cpu")]
    zeros = [torch.zeros(0, dtype=torch.uint8, device="cpu")]
    for start, stop, size in _spans(len(values), grid):
        rows = values[start:stop].reshape(-1, size).float() / unit
        weigh = None if weights is None else weights[start:stop].reshape(-1, size).float()
        scale, zero = _fit_rows(rows, grid, weigh)
        scales.append(scale.to(grid.dtype))
        zeros.append(zero.to(torch.uint8))
    return Groups(torch.cat(scales), None if grid.symmetric else torch.cat(zeros), unit)


def nearest_code(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, width: int
) -> torch.Tensor:
    """The code (a float) whose level (code - zero) * scale is nearest; all shapes broadcast.

    Where the scale is zero every level is zero, and the code is that next to `zero`.
    """
    steps = values / torch.where(scale > 0, scale, math.inf)
    return (steps + zero).round_().clamp_(0, (1 << width) - 1)


def quantise(
    values: torch.Tensor,
    grid: Grid,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    unit: float,
) -> torch.Tensor:
    """Codes (n,) uint8 of fp32 `values` (n,): each value to its nearest level."""

    def code(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return nearest_code(rows.float(), scale, zero, grid.width).to(torch.uint8)

    return _by_groups(values, grid, Groups(scales, zeros, unit), torch.uint8, code)


def dequantise(
    codes: torch.Tensor,
    grid: Grid,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    unit: float,
) -> torch.Tensor:
    """fp32 values (n,) of `codes` (n,). One rounding a value: the same on every machine."""

    def level(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (rows.float() - zero) * scale

    return _by_groups(codes, grid, Groups(scales, zeros, unit), torch.float32, level)


def entry_grid(count: int, grid: Grid, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), fp32 (n,) each: level = (code - zero) * scale for every single value."""
    scale, zero = _grid_of(grid, groups)
    return (
        scale.repeat_interleave(grid.group)[:count],
        zero.repeat_interleave(grid.group)[:count],
    )


def _unit(values: torch.Tensor) -> float:
    """The power of two that brings the largest magnitude into [2^13, 2^14)."""
    peak = float(values.abs().max()) if len(values) else 0.0
    if not math.isfinite(peak):
        raise ValueError("a value to quantise is not a finite number")
    return math.ldexp(1.0, max(-100, math.frexp(peak)[1] - 1 - _PEAK_EXPONENT)) if peak else 1.0


def _grid_of(grid: Grid, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, with the unit in it, and zero: fp32, (groups,) each."""
    scale = groups.scales.float() * groups.unit
    if groups.zeros is None:
        return scale, torch.full_like(scale, grid.top / 2)
    return scale, groups.zeros.float()


def _by_groups(
    values: torch.Tensor,
    grid: Grid,
    groups: Groups,
    dtype: torch.dtype,
    apply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`apply` to all groups, a chunk of whole groups at a time; (n,) in, (n,) of `dtype` out."""
    if len(groups.scales) != grid.groups(len(values)):
        raise ValueError(f"{len(groups.scales)} scales do not serve {len(values)} values")
    scale, zero = _grid_of(grid, groups)
    out = torch.empty(len(values), dtype=dtype, device="cpu")
    for start, stop, size in _spans(len(values), grid):
        held = slice(start // grid.group, grid.groups(stop))
        rows = apply(values[start:stop].reshape(-1, size), scale[held, None], zero[held, None])
        out[start:stop] = rows.reshape(-1)
    return out


def _spans(count: int, grid: Grid) -> Iterator[tuple[int, int, int]]:
    """(start, stop, size of its groups) of chunks of whole groups; last the short group, if any."""
    whole = count // grid.group * grid.group
    step = max(1, _CHUNK_VALUES // grid.group) * grid.group
    for start in range(0, whole, step):
        yield start, min(start + step, whole), grid.group
    if whole < count:
        yield whole, count, count - whole


class _Search:
    """The best (scale, zero) so far of each row of `rows` (g, k)."""

    def __init__(self, rows: torch.Tensor, grid: Grid, weights: torch.Tensor | None):
        self.rows, self.grid, self.weights = rows, grid, weights
        self.scale = torch.zeros(len(rows), 1, dtype=torch.float32, device="cpu")
        self.zero = torch.full(
            (len(rows), 1),
            grid.top / 2 if grid.symmetric else 0.0,
            dtype=torch.float32,
            device="cpu",
        )
        self.error = self._weigh(rows * rows)  # of a scale of zero

    def _weigh(self, x: torch.Tensor) -> torch.Tensor:
        return (x if self.weights is None else x * self.weights).sum(1, keepdim=True)

    def try_(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Take over scale and zero (g, 1) where they lower the error."""
        scale = scale.to(self.grid.dtype).float()
        steps = nearest_code(self.rows, scale, zero, self.grid.width) - zero
        error = self._weigh((steps * scale - self.rows).square_())
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def refine(self) -> None:
        """Least squares for the present codes: scale = <x, k> / <k, k>, k = code - zero."""
        steps = nearest_code(self.rows, self.scale, self.zero, self.grid.width) - self.zero
        scale = self._weigh(self.rows * steps) / self._weigh(steps * steps).clamp_min(1e-30)
        self.try_(scale, self.zero)


def _fit_rows(
    rows: torch.Tensor, grid: Grid, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero (g,) of least squared error for each row of `rows` (g, k)."""
    search = _Search(rows, grid, weights)
    if grid.symmetric:
        full = 2 * rows.abs().amax(1, keepdim=True) / grid.top
        # Twice the mean over 2^w - 1: the best scale of one bit, and a start where one value rules.
        search.try_(2 * rows.abs().mean(1, keepdim=True) / grid.top, search.zero)
        for factor in COARSE:
            search.try_(full * factor, search.zero)
    else:
        low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
        full = (high - low) / grid.top
        middle = (-low / full.clamp_min(1e-30)).round()
        for factor in COARSE:
            for shift in (-1, 0, 1):
                search.try_(full * factor, (middle + shift).clamp(0, grid.top))
    found = search.scale
    for factor in FINE:
        search.try_(found * factor, search.zero)
    search.refine()
    return search.scale.reshape(-1), search.zero.reshape(-1)
