"""Steps that follow from what errors cost: the formula by hand, and the grid as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deltafold.codecs import delta_codec
from deltafold.codecs.auto import AutoConfig
from deltafold.codecs.steps import grid_for
from deltafold.coding import dither
from deltafold.coding.grid import CONTEXTS, GROUPS, Grid, powers
from deltafold.coding.levels import pack, unpack
from deltafold.linalg.matrices import DenseMatrix, Fisher

few = settings(deadline=None, max_examples=40)
exponents = st.integers(-12, 12)
KEY = 0xA6A7854E2D6C487D


def normal(o: int, i: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed))


def test_half_octaves() -> None:
    found = powers(np.array([-3, -2, 0, 1, 4], np.int8))
    assert found.tolist() == pytest.approx([2**-1.5, 0.5, 1, 2**0.5, 4], rel=1e-7)


def test_steps_by_the_formula() -> None:
    """unit = step sigma (sigma F^1/2)^-1/2 (f_r / f + 1/10)^-1/2 (h_j / h + 3/10)^-1/2."""
    delta = normal(256, 512)
    sigma = float(delta.square().mean().sqrt())
    rows = torch.cat([torch.full((128,), 15.9), torch.full((128,), 0.1)])  # mean 8
    columns = torch.cat([torch.full((256,), 3.7), torch.full((256,), 0.3)])  # mean 2
    grid = grid_for(DenseMatrix(delta, Fisher(rows, columns)), step=3.0)
    assert grid is not None and grid.sizes is None
    assert float(grid.unit) == pytest.approx(3 * sigma * (sigma * 4) ** -0.5)
    # (15.9 / 8 + 0.1)^-1/2 = 2^-0.53, (0.1 / 8 + 0.1)^-1/2 = 2^1.58: whole octaves -1 and 2.
    assert np.unique(grid.rows[:128]).tolist() == [-2]
    assert np.unique(grid.rows[128:]).tolist() == [4]
    # (3.7 / 2 + 0.3)^-1/2 = 2^-0.55, (0.3 / 2 + 0.3)^-1/2 = 2^0.58: whole octaves -1 and 1.
    assert np.unique(grid.columns[:256]).tolist() == [-2]
    assert np.unique(grid.columns[256:]).tolist() == [2]


def test_uniform_steps_do_not_look_at_costs() -> None:
    delta = normal(64, 64)
    known = DenseMatrix(delta, Fisher(torch.linspace(0.1, 10, 64), torch.linspace(0.1, 10, 64)))
    uniform = grid_for(known, 3.0, uniform=True)
    assert uniform == grid_for(DenseMatrix(delta), 3.0)
    assert uniform is not None and uniform.rows is None and uniform.columns is None
    codecs = [delta_codec("auto"), type(delta_codec("auto"))(AutoConfig(uniform=True))]
    codes = [codec.encode(known, {"step": 3.0}, KEY)[1]["code"] for codec in codecs]
    assert not torch.equal(*codes) if len(codes[0]) == len(codes[1]) else True


def test_vectors_that_save_less_than_they_cost_are_left_out() -> None:
    nearly_even = Fisher(torch.linspace(0.9, 1.1, 64), torch.linspace(0.01, 4, 64) ** 4)
    grid = grid_for(DenseMatrix(normal(64, 64), nearly_even), 1.0)
    assert grid is not None and grid.rows is None and grid.columns is not None
    coarse = grid_for(DenseMatrix(normal(64, 64), nearly_even), 1000.0)  # a few bytes in all
    assert coarse is not None and coarse.columns is None


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_costs_that_say_nothing(bad: float) -> None:
    delta = normal(32, 32)
    grid = grid_for(DenseMatrix(delta, Fisher(torch.ones(32), torch.full((32,), bad))), 2.0)
    assert grid == grid_for(DenseMatrix(delta), 2.0)


@pytest.mark.parametrize("weighed", [False, True])
def test_no_entry_is_beyond_the_largest_level(weighed: bool) -> None:
    """Fine steps, and one large entry in a row that counts much: it comes back all the same."""
    delta = normal(128, 96)
    delta[5, 7], delta[9] = 300.0, 50 * delta[9]
    cost = Fisher(10 ** torch.linspace(3, -3, 128), 10 ** torch.linspace(3, -3, 96))
    codec = delta_codec("auto")
    matrix = DenseMatrix(delta, cost if weighed else None)
    chosen, parts = codec.encode(matrix, {"step": 0.02}, KEY)
    rows = torch.cat([each for _, each in codec.decode(parts, chosen, (128, 96), KEY)])
    units = grid_for(matrix, 0.02)
    assert units is not None
    steps = units.row_units(np.arange(128)) * units.column_units(96)
    assert ((rows - delta).abs() <= 1.0001 * steps).all()
    assert float((rows - delta)[5, 7]) == pytest.approx(0, abs=300 / 30)


def test_a_zero_matrix_has_no_steps() -> None:
    assert grid_for(DenseMatrix(torch.zeros(20, 20)), 1.0) is None


def test_errors_are_small_where_they_cost_most() -> None:
    """At equal bytes the weighted error is lower, and it is still right on average."""
    delta, cost = normal(512, 256), Fisher(torch.ones(512), 10 ** torch.linspace(-3, 0, 256))
    found = {}
    for name, matrix in (("alike", DenseMatrix(delta)), ("weighed", DenseMatrix(delta, cost))):
        codec = delta_codec("auto")
        low, high = 0.1, 100.0
        for _ in range(20):  # the step that gives 20 kB
            step = (low * high) ** 0.5
            chosen, parts = codec.encode(matrix, {"step": step}, KEY)
            low, high = (low, step) if chosen["n_bytes"] <= 20_000 else (step, high)
        assert chosen["n_bytes"] == pytest.approx(20_000, rel=0.01)
        rows = torch.cat([each for _, each in codec.decode(parts, chosen, (512, 256), KEY)])
        found[name] = float(((rows - delta).square() * cost.columns).sum())
    assert found["weighed"] < 0.75 * found["alike"]


@few
@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 100))
def test_a_grid_survives_its_bytes(data: st.DataObject, o: int, i: int, unit: float) -> None:
    def vector(size: int) -> np.ndarray | None:
        drawn = data.draw(st.none() | arrays(np.int8, size, elements=exponents))
        return drawn

    sizes = vector(o)
    follow = sizes is not None and data.draw(st.booleans())
    grid = Grid.of(unit, 0.7, None if follow else vector(o), vector(i), sizes, follow)
    again, rest = Grid.from_bytes(grid.to_bytes() + b"rest", (o, i), float(grid.unit))
    assert rest == b"rest"
    for name in ("unit", "reach", "first", "follow"):
        assert getattr(again, name) == getattr(grid, name)
    for name in ("rows", "columns", "sizes"):
        ours, theirs = getattr(grid, name), getattr(again, name)
        assert (ours is None) == (theirs is None) and (ours is None or (ours == theirs).all())


@few
@given(st.data(), st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 100))
def test_levels_survive_their_bytes(data: st.DataObject, o: int, i: int, unit: float) -> None:
    rows = data.draw(arrays(np.int8, o, elements=exponents))
    columns = data.draw(arrays(np.int8, i, elements=exponents))
    levels = data.draw(arrays(np.int8, (o, i), elements=st.integers(-60, 60)))
    grid = Grid.of(unit, 1.0, rows, columns)
    _, coded = unpack(pack(levels, grid, KEY), (o, i), KEY)
    assert torch.equal(torch.cat([each for _, each in coded]), torch.from_numpy(levels).float())


def test_contexts() -> None:
    """Class by t m with m = w / 5, group by half octaves of w = unit / size, from 1/16 to 2."""
    found = np.array([[0, 1 << 12, 1 << 15, (1 << 16) - 1]], np.uint16)
    fine, coarse = Grid.of(0.05, 1.0), Grid.of(20.0, 1.0)
    assert fine.contexts(np.array([0]), found).tolist() == [0, 1, 8, 15]
    last = 17 * (GROUPS - 1)
    assert coarse.contexts(np.array([0]), found).tolist() == [last, last + 4, last + 16, last + 16]
    middle = Grid.of(0.5, 1.0)  # two octaves below 2
    assert middle.contexts(np.array([0]), found)[0] == 17 * (GROUPS - 1 - 4)
    rows = Grid.of(20.0, 1.0, rows=np.array([0, -8], np.int8))  # 20 and 1.25
    assert (rows.contexts(np.array([0, 1]), np.zeros((2, 1), np.uint16)) // 17).tolist() == [10, 8]
    assert CONTEXTS == 187 and dither.CLASSES == 16


@pytest.mark.parametrize("at", [4, 9, 20])
def test_damage_is_noticed(at: int) -> None:
    levels = np.ones((8, 16), np.int8)
    code = bytearray(pack(levels, Grid.of(1.0, 1.0, columns=np.arange(16, dtype=np.int8)), KEY))
    code[at] ^= 0x5A
    with pytest.raises(ValueError, match=r"damaged|ends|holds|longer|promised|table"):
        _, coded = unpack(bytes(code), (8, 16), KEY)
        list(coded)
