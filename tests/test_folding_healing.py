"""Closed forms against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from deltafold.folding.by_paper import Rows, by_paper
from deltafold.folding.methods.healing import (
    Regression,
    channel_scales,
    folded_in,
    patch_scale,
    replace_me,
    replace_me_cosine,
    rotation,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_replace_me_by_hand() -> None:
    """One column: T = sum m (z - y + m) / (sum m^2 + lambda) = (1 x 3 + 2 x 5) / (5 + 8)."""
    made = torch.tensor([[1.0], [2.0]])
    output, target = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [4.0]])
    assert replace_me(made, output, target, 8.0).item() == pytest.approx((1 * 3 + 2 * 5) / 13)


def test_a_named_patch_by_hand() -> None:
    """As above, with a thousandth of the mean of M'M's diagonal, 5, for lambda."""
    made = torch.tensor([[1.0], [2.0]])
    output, target = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [4.0]])
    rows = [Rows(made[n:][:1], output[n:][:1], target[n:][:1], torch.zeros(1) > 0) for n in (0, 1)]
    assert by_paper(rows, "replace-me")[0].item() == pytest.approx((1 * 3 + 2 * 5) / 5.005)


def test_the_scale_of_a_patch_by_hand() -> None:
    """Two channels turned by 45 degrees: (a + b, a - b) / sqrt 2, ratios 8 / 4 and 1 / 2."""
    before, after = torch.tensor([[3.0, 1.0]]), torch.tensor([[4.5, 3.5]])
    # Turned: 4 and 2 before, 8 and 1 after, over sqrt 2.
    assert patch_scale(before, after) == pytest.approx((8 / 4 + 1 / 2) / 2)


def test_replace_me_finds_a_linear_cut() -> None:
    """The removed blocks added M B: then T = I + B, and output with T in place is the target."""
    made, stream, extra = normal(50, 4), normal(50, 4, seed=1), 0.3 * normal(4, 4, seed=2)
    found = replace_me(made, stream + made, stream + made + made @ extra, 0.0)
    assert torch.allclose(found, torch.eye(4).double() + extra, atol=1e-9)


def test_replace_me_cosine_turns_towards_the_target() -> None:
    """M has to be turned by 30 degrees and be 1.2 times as long; the target's length does not count."""
    c, s = math.sqrt(0.75), 0.5
    turn = 1.2 * torch.tensor([[c, s], [-s, c]]).double()
    made, rest = normal(300, 2), normal(300, 2, seed=1)
    lengths = normal(300, 1, seed=2).abs() + 0.1
    target = lengths * (made @ turn + rest)
    found = replace_me_cosine(made, made + rest, target)
    assert torch.allclose(found, turn, atol=0.1)
    near = torch.nn.functional.cosine_similarity(made @ found + rest, target, dim=1)
    before = torch.nn.functional.cosine_similarity(made + rest, target, dim=1)
    assert float(1 - near.mean()) < 0.02 * float(1 - before.mean())
    assert torch.equal(found, replace_me_cosine(made, made + rest, target))


def test_a_regression_is_its_definition() -> None:
    x, y = normal(30, 5), normal(30, 3, seed=1)
    regression = Regression(5, 3)
    for part in range(0, 30, 10):
        regression.add(x[part : part + 10], y[part : part + 10])
    fit = regression.fit((0.1,))
    damp = 0.1 * (x * x).sum() / 5
    wanted = torch.linalg.solve(x.T @ x + damp * torch.eye(5).double(), x.T @ y)
    assert torch.allclose(fit.solution, wanted)
    assert fit.after == pytest.approx(float(((x @ wanted - y) ** 2).sum()))
    assert fit.before == pytest.approx(float((y * y).sum()))


def test_the_ridge_is_chosen_on_rows_held_out() -> None:
    """Much noise and few rows: a weak ridge fits the noise, and does worse on other rows."""
    true = normal(20, 2, seed=3)
    x, other = normal(25, 20), normal(200, 20, seed=4)
    regression = Regression(20, 2)
    regression.add(x, x @ true + 6 * normal(25, 2, seed=5))
    regression.add(other, other @ true, held=True)
    chosen = regression.fit()
    assert chosen.ridge is not None and chosen.ridge > 0.3
    errors = [regression.held.error(regression.fitted.solve(each)) for each in (1e-4, 0.3)]
    assert chosen.after < min(errors)
    alone = regression.fitted.solve(chosen.ridge)
    assert chosen.after == pytest.approx(float(((other @ alone - other @ true) ** 2).sum()))


def test_all_rows_are_fitted_with_the_ridge_that_was_chosen() -> None:
    x, y = normal(40, 5), normal(40, 5) @ normal(5, 3, seed=1) + 0.1 * normal(40, 3, seed=2)
    regression = Regression(5, 3)
    regression.add(x[:30], y[:30])
    regression.add(x[30:], y[30:], held=True)
    fit = regression.fit()
    assert fit.ridge is not None
    damp = fit.ridge * (x * x).sum() / 5
    wanted = torch.linalg.solve(x.T @ x + damp * torch.eye(5).double(), x.T @ y)
    assert torch.allclose(fit.solution, wanted, rtol=1e-9)


def test_nothing_is_changed_where_nothing_helps() -> None:
    regression = Regression(8, 2)
    regression.add(normal(9, 8), normal(9, 2, seed=1))
    regression.add(normal(50, 8, seed=2), torch.zeros(50, 2).double(), held=True)
    fit = regression.fit()
    assert fit.ridge is None and not fit.solution.any() and fit.after == fit.before


@pytest.mark.parametrize("width", [1, 8, 6, 36, 576])
def test_rotations_are_orthogonal(width: int) -> None:
    turn = rotation(width)
    assert torch.allclose(turn @ turn.T, torch.eye(width).double(), atol=1e-12)
    if width == 8:
        assert torch.allclose(turn.abs(), torch.full((8, 8), 8**-0.5).double())


def test_channel_scales_by_hand() -> None:
    before = torch.tensor([[1.0, 0, 2], [-1, 0, 0]])
    after = torch.tensor([[3.0, 5, 1], [1, 0, 0]])
    assert channel_scales(before, after).tolist() == [2.0, 1.0, 0.5]


def test_a_scale_is_that_of_linear_patch() -> None:
    """P = Q diag(c) Q' stretches rotated channels by 1 to 8: of all multiples of I the nearest is 4.5."""
    before, turn = normal(40, 8), rotation(8)
    stretched = (before @ turn * torch.arange(1, 9)) @ turn.T
    assert patch_scale(before, stretched) == pytest.approx(4.5)
    patch = (turn * channel_scales(before @ turn, stretched @ turn)) @ turn.T
    assert torch.allclose(before @ patch, stretched, atol=1e-9)
    gaps = [float((patch - scale * torch.eye(8)).norm()) for scale in (4.4, 4.5, 4.6)]
    assert min(gaps) == gaps[1]


@pytest.mark.parametrize("transposed", [False, True])
def test_folding_in_is_following(transposed: bool) -> None:
    weight, bias, change, x = normal(3, 5), normal(3, seed=1), normal(3, 3, seed=2), normal(7, 5)
    stored = weight.T if transposed else weight
    made = folded_in(stored, change, transposed).double()
    kept = made.T if transposed else made
    new_bias = folded_in(bias, change, transposed).double()
    assert torch.allclose(x @ kept.T + new_bias, (x @ weight.T + bias) @ change, atol=1e-5)
    experts = folded_in(torch.stack([stored, 2 * stored]), change, transposed)
    assert torch.allclose(experts[1].double(), 2 * made, atol=1e-5)
    assert math.isfinite(float(experts.sum()))
