"""Group quantisers: formulas, scales near the best, stored bytes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.coding.quantizer import (
    Grid,
    Groups,
    dequantise,
    entry_grid,
    fit_groups,
    quantise,
)

few = settings(deadline=None, max_examples=60)
grids = st.builds(
    Grid,
    width=st.integers(1, 8),
    group=st.sampled_from([1, 3, 8, 128]),
    symmetric=st.booleans(),
    dtype_name=st.sampled_from(["F16", "BF16"]),
)
numbers = st.floats(-1, 1, width=32, allow_subnormal=False)


def coded(values: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Groups, torch.Tensor]:
    groups = fit_groups(values, grid)
    codes = quantise(values, grid, *groups)
    return codes, groups, dequantise(codes, grid, *groups)


def error(values: torch.Tensor, grid: Grid) -> float:
    return float((coded(values, grid)[2] - values).double().square().sum())


def test_symmetric_levels_by_hand():
    """Two bits: codes 0 1 2 3 are -1.5 -0.5 0.5 1.5 scales; a value takes the nearest."""
    grid = Grid(2, group=4)
    scales = torch.tensor([2.0], dtype=torch.float16)
    codes = quantise(torch.tensor([-9.0, -0.1, 0.1, 2.5]), grid, scales, None, 0.5)
    assert codes.tolist() == [0, 1, 2, 3]
    assert dequantise(codes, grid, scales, None, 0.5).tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_asymmetric_levels_by_hand():
    """Two bits, zero 1: codes 0 1 2 3 are -1 0 1 2 scales."""
    grid = Grid(2, group=3, symmetric=False)
    groups = Groups(torch.tensor([2.0, 1.0]).half(), torch.tensor([1, 3], dtype=torch.uint8), 1.0)
    values = torch.tensor([-9.0, 0.9, 3.1, -2.0, 5.0])
    codes = quantise(values, grid, *groups)
    assert codes.tolist() == [0, 1, 3, 1, 3]
    assert dequantise(codes, grid, *groups).tolist() == [-2.0, 0.0, 4.0, -2.0, 0.0]


@few
@given(grids, st.lists(numbers, max_size=300), st.integers(-60, 30))
def test_codes_and_groups_have_their_stated_sizes(grid: Grid, values: list[float], exponent: int):
    x = torch.tensor(values) * 2.0**exponent
    codes, groups, restored = coded(x, grid)
    assert codes.dtype == torch.uint8
    assert len(codes) == 0 or int(codes.max()) <= grid.top
    assert codes.shape == restored.shape == x.shape
    n_groups = math.ceil(len(x) / grid.group)
    assert groups.scales.dtype == grid.dtype and groups.scales.shape == (n_groups,)
    assert (groups.zeros is None) == grid.symmetric
    if groups.zeros is not None:
        assert groups.zeros.dtype == torch.uint8 and groups.zeros.shape == (n_groups,)
        assert not n_groups or int(groups.zeros.max()) <= grid.top
    assert math.frexp(groups.unit)[0] == 0.5  # a power of two


@few
@given(grids, st.lists(numbers, min_size=1, max_size=300))
def test_every_value_takes_the_nearest_level_of_its_group(grid: Grid, values: list[float]):
    x = torch.tensor(values)
    codes, groups, restored = coded(x, grid)
    scale, zero = entry_grid(len(x), grid, groups)
    levels = (torch.arange(grid.top + 1.0) - zero[:, None]) * scale[:, None]
    assert torch.equal(levels.gather(1, codes.long()[:, None])[:, 0], restored)
    best = (levels - x[:, None]).abs().amin(1)
    assert torch.all((restored - x).abs() <= best * (1 + 1e-5) + scale * 1e-5)


@few
@given(grids, st.lists(numbers, min_size=1, max_size=300))
def test_coding_never_costs_more_than_storing_nothing(grid: Grid, values: list[float]):
    x = torch.tensor(values)
    assert error(x, grid) <= float(x.double().square().sum()) * (1 + 1e-5)


def exhaustive(values: torch.Tensor, grid: Grid) -> float:
    """Least squared error over 400 scales and all zeros, one group at a time."""
    total = 0.0
    for row in values.double().reshape(-1, grid.group):
        zeros = [grid.top / 2] if grid.symmetric else range(grid.top + 1)
        scales = torch.linspace(0.002, 1.0, 400, dtype=torch.float64) * 2 * row.abs().max()
        best = math.inf
        for zero in zeros:
            codes = (row / scales[:, None] + zero).round().clamp(0, grid.top)
            levels = (codes - zero) * scales[:, None]
            best = min(best, float((levels - row).square().sum(1).min()))
        total += best
    return total


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy", "sparse", "shifted"])
def test_scales_are_near_the_best(kind: str, width: int, symmetric: bool):
    x = torch.randn(128 * 16, generator=torch.Generator().manual_seed(width))
    if kind == "heavy":
        x = x**3
    if kind == "sparse":
        x[torch.arange(len(x)) % 9 != 0] = 0
    if kind == "shifted":
        x += 1
    grid = Grid(width, symmetric=symmetric)
    assert error(x, grid) <= 1.03 * exhaustive(x, grid)


def test_one_bit_scale_is_twice_the_mean():
    """The optimum in closed form: sign times mean absolute value."""
    x = torch.randn(128, generator=torch.Generator().manual_seed(0))
    groups = fit_groups(x, Grid(1))
    mean = float(x.abs().mean())
    assert float(groups.scales) * groups.unit / 2 == pytest.approx(mean, rel=2e-3)


def test_weights_move_the_scale():
    x = torch.randn(512, generator=torch.Generator().manual_seed(1))
    weights = torch.where(x.abs() > 1.5, 100.0, 1.0)

    def weighted(groups: Groups) -> float:
        restored = dequantise(quantise(x, Grid(2), *groups), Grid(2), *groups)
        return float((weights * (restored - x).square()).sum())

    assert weighted(fit_groups(x, Grid(2), weights)) < 0.7 * weighted(fit_groups(x, Grid(2)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_values_do_not_underflow(symmetric: bool):
    """Deltas of 1e-8, and groups a million times smaller than the largest value."""
    noise = torch.randn(256, generator=torch.Generator().manual_seed(2))
    grid = Grid(4, symmetric=symmetric)
    for x in (noise * 1e-8, torch.cat([noise * 1e-2, noise * 1e-8])):
        *_, restored = coded(x, grid)
        tail, tail_restored = x[-256:].double(), restored[-256:].double()
        assert float((tail_restored - tail).square().sum() / tail.square().sum()) < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_comes_back_as_zeros(symmetric: bool):
    x = torch.zeros(300)
    x[:128] = torch.linspace(-1, 1, 128)
    codes, _, restored = coded(x, Grid(3, symmetric=symmetric))
    assert set(codes[128:].tolist()) == {4 if symmetric else 0}
    assert float(restored[128:].abs().max()) == 0.0
    assert coded(torch.zeros(5), Grid(3, symmetric=symmetric))[2].tolist() == [0.0] * 5


@pytest.mark.parametrize("exponent", [-40, -13, 0, 20])
def test_scales_do_not_overflow(exponent: int):
    """Equal values just below a power of two: the largest scale there is, twice the value."""
    x = torch.full((10,), 1.99 * 2.0**exponent)
    *_, restored = coded(x, Grid(1))
    assert torch.allclose(restored, x, rtol=1e-3, atol=0)


def test_error_falls_with_width():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    for symmetric in (True, False):
        errors = [error(x, Grid(width, symmetric=symmetric)) for width in range(1, 9)]
        assert all(b < 0.5 * a for a, b in pairwise(errors))


def test_chunks_do_not_change_the_result():
    grid = Grid(3, group=100)
    x = torch.randn(1_200_050, generator=torch.Generator().manual_seed(4))
    codes, groups, restored = coded(x, grid)
    first = coded(x[:5000], grid)
    last = coded(x[1_200_000:], grid)
    assert torch.equal(restored[-50:], last[2])
    assert groups.unit == first[1].unit * 2.0 ** round(math.log2(groups.unit / first[1].unit))
    assert torch.equal(restored[:5000], first[2])
    assert torch.equal(codes[:5000], first[0])


def test_codes_are_pinned():
    """For ever: archives hold them. Halves go to the even code."""
    values = torch.tensor([-0.75, -0.5, 0.25, 0.5, 0.5, 0.75, -0.25])
    groups = Groups(torch.tensor([8192.0, 4096.0]).half(), None, 2.0**-14)
    assert quantise(values, Grid(3, group=6), *groups).tolist() == [2, 2, 4, 4, 4, 5, 2]


def test_bad_settings_and_values_are_refused():
    with pytest.raises(ValueError, match="1 to 8 bits"):
        Grid(9)
    with pytest.raises(ValueError, match="at least one value"):
        Grid(4, group=0)
    with pytest.raises(ValueError, match="not a finite number"):
        fit_groups(torch.tensor([1.0, math.inf]), Grid(2))
    grid = Grid(3, group=4, symmetric=False)
    codes, groups, _ = coded(torch.arange(10.0), grid)
    with pytest.raises(ValueError, match="do not serve"):
        dequantise(codes[:4], grid, *groups)
