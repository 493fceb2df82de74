"""Sparsifiers and consensus rules against their papers' formulas, by hand; and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.merging.methods import CONSENSUS, PRESETS, SPARSIFIERS
from deltafold.merging.methods.sparsify import kept_count

few = settings(deadline=None, max_examples=30)
KEY = 0xA6A7854E2D6C487D


def sparse(name: str, delta: torch.Tensor, density: float, **numbers: float) -> torch.Tensor:
    return SPARSIFIERS[name](delta, density, KEY, numbers)


def merged(
    name: str, deltas: list[list[float]], weights: list[float], **numbers: float
) -> list[float]:
    found = CONSENSUS[name]([torch.tensor(each) for each in deltas], weights, numbers)
    return [round(value, 5) for value in found.tolist()]


def test_magnitude_keeps_the_largest() -> None:
    delta = torch.tensor([[0.1, -0.9, 0.3], [0.5, -0.2, 0.0]])
    assert sparse("magnitude", delta, 0.5).tolist() == [
        [0, pytest.approx(-0.9), pytest.approx(0.3)], [pytest.approx(0.5), 0, 0]
    ]  # fmt: skip
    equal = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert sparse("magnitude", equal, 0.5).tolist() == [1, -1, 0, 0]  # of equal ones the first


def test_dare_rescales_by_one_over_density() -> None:
    """Not by matching norms: each kept entry is d / density, and the mean stays right."""
    delta = torch.full((400, 500), 2.0)
    found = sparse("dare", delta, 0.2)
    assert set(found.unique().tolist()) == {0.0, 10.0}
    assert float(found.mean()) == pytest.approx(2.0, abs=0.05)
    tiny = sparse("dare", torch.tensor([1.0]), 0.1)
    assert tiny.item() in (0.0, 10.0)


def test_della_drops_small_entries_more_often() -> None:
    """Keep probability density + eps/2 for the largest of a row, density - eps/2 for the smallest."""
    delta = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(50_000, 4).clone()
    found = sparse("della", delta, 0.5, epsilon=0.3)
    kept = (found != 0).float().mean(0)
    wanted = torch.tensor([0.65, 0.55, 0.45, 0.35])
    assert torch.allclose(kept, wanted, atol=0.01)
    assert torch.allclose(found.mean(0), delta[0], rtol=0.03)  # unbiased
    assert torch.allclose(found[found[:, 0] != 0][0, 0], torch.tensor(4 / 0.65))


def test_breadcrumbs_leave_both_ends() -> None:
    delta = torch.arange(1.0, 11.0) * torch.tensor([1.0, -1.0] * 5)
    found = sparse("breadcrumbs", delta, 0.5, gamma=0.2)  # not 10, 9; then five: 8 .. 4
    assert found.abs().tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]
    small = sparse("breadcrumbs", torch.randn(64, generator=torch.Generator()), 0.9, gamma=0.2)
    assert int((small != 0).sum()) == kept_count(0.9, 64)  # outliers give way to the density


def test_impart_keeps_its_share_and_the_leading_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 1, generator=generator) for n in (48, 40))
    delta = 3 * left @ right.T + 0.02 * torch.randn(48, 40, generator=generator)
    found = sparse("impart", delta, 0.3)
    assert torch.nn.functional.cosine_similarity(found.reshape(-1), delta.reshape(-1), 0) > 0.99
    vector = torch.randn(40)
    assert torch.equal(sparse("impart", vector, 0.3), vector)  # no matrix


@pytest.mark.parametrize("name", SPARSIFIERS)
@pytest.mark.parametrize("shape", [(32,), (1,), (3, 5), (20, 17)])
def test_edges(name: str, shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    nothing = sparse(name, delta, 0.0)
    if name == "none" or (name == "impart" and (len(shape) == 1 or min(shape) < 16)):
        assert torch.equal(nothing, delta)
    else:
        assert not nothing.any() and nothing.isfinite().all()
    assert sparse(name, delta, 1.0).isfinite().all()
    if name not in ("breadcrumbs",):
        assert torch.allclose(sparse(name, delta, 1.0), delta)
    zeros = sparse(name, torch.zeros(shape), 0.4)
    assert not zeros.any() and zeros.isfinite().all()


@few
@given(st.integers(1, 200), st.floats(0, 1))
def test_something_is_kept(n: int, density: float) -> None:
    count = kept_count(density, n)
    assert (count == 0) == (density == 0)
    assert count == max(1, int(density * n)) or density == 0
    found = sparse("magnitude", torch.arange(1.0, n + 1), density)
    assert int((found != 0).sum()) == count


def test_sum_and_mean() -> None:
    deltas, weights = [[1.0, 2.0, 0.0], [3.0, -2.0, 4.0]], [0.5, 1.5]
    assert merged("sum", deltas, weights) == [5.0, -2.0, 6.0]
    assert merged("mean", deltas, weights) == [2.5, -1.0, 3.0]
    assert merged("mean", deltas, [1.0, -1.0]) == [0, 0, 0]  # nothing to divide by
    assert merged("sum", deltas, weights, normalize=1) == [2.5, -1.0, 3.0]


def test_ties_elects_a_sign_and_averages_those_that_agree() -> None:
    deltas = [[2.0, 1.0, 0.0, -1.0], [1.0, -3.0, 0.0, -2.0], [-1.0, 1.0, 5.0, 0.0]]
    # Signs of the sums: +, -, +, -; the means of those that agree, zeros not voting.
    assert merged("ties", deltas, [1.0, 1.0, 1.0]) == [1.5, -3.0, 5.0, -1.5]
    assert merged("ties", deltas, [1.0, 0.0, 1.0]) == [2.0, 1.0, 5.0, -1.0]
    assert merged("ties", deltas, [1.0, 1.0, 1.0], normalize=0) == [3.0, -3.0, 5.0, -3.0]
    assert merged("ties", [[1.0, 0.0]], [0.5]) == [1.0, 0.0]  # one model: itself


def test_slerp() -> None:
    """A quarter turn in the middle: both times sin(45) / sin(90); along a line if parallel."""
    half = round(math.sin(math.pi / 4), 5)
    assert merged("slerp", [[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0]) == [half, half]
    assert merged("slerp", [[1.0, 0.0], [0.0, 1.0]], [1.0, 0.0]) == [1.0, 0.0]
    assert merged("slerp", [[1.0, 0.0], [3.0, 0.0]], [1.0, 1.0]) == [2.0, 0.0]
    assert merged("slerp", [[0.0, 0.0], [2.0, 0.0]], [1.0, 1.0]) == [1.0, 0.0]
    third = [round(math.sin(a * math.pi / 2) / 1.0, 5) for a in (2 / 3, 1 / 3)]
    assert merged("slerp", [[1.0, 0.0], [0.0, 1.0]], [2.0, 1.0]) == third


def test_consensus_wants_two_who_need_an_entry() -> None:
    deltas = [[4.0, 1.0, 0.1], [0.1, 1.0, 0.1], [0.0, 1.0, 3.0]]
    # |D_i| >= 0.4 |others|: entry 0 by the first alone, 1 by all (1 >= .8), 2 by the third alone.
    assert merged("consensus", deltas, [1.0] * 3) == [0.0, 3.0, 0.0]
    assert merged("consensus", deltas, [1.0] * 3, agree=1) == [4.1, 3.0, 3.2]
    assert merged("consensus", [[2.0]], [1.0]) == [2.0]


@pytest.mark.parametrize("name", sorted(set(CONSENSUS) - {"slerp"}))
def test_zeros_stay_zeros(name: str) -> None:
    assert merged(name, [[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0]) == [0, 0]


def test_presets_name_rows_of_the_tables() -> None:
    for name, preset in PRESETS.items():
        assert preset.sparsifier in SPARSIFIERS and preset.consensus in CONSENSUS, name
        assert 0 < preset.density <= 1
