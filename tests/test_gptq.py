"""GPTQ against slow, transparent references."""

from __future__ import annotations

import pytest
import torch

from deltafold.coding.gptq import BLOCK, gptq, inverse_factor
from deltafold.coding.quantizer import Grid, entry_grid, fit_groups, quantise


def make(m: int, n: int, width: int, seed: int, density: float = 1.0, rank: int = 6):
    """weight, hessian of correlated inputs, grids, mask and the codes of rounding to nearest."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=generator) < density
    weight = torch.where(mask, torch.randn(m, n, generator=generator) * 1e-3, 0.0)
    inputs = torch.randn(4 * n, rank, generator=generator) @ torch.randn(
        rank, n, generator=generator
    )
    inputs += 0.3 * torch.randn(4 * n, n, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    grid = Grid(width, group=32)
    groups = fit_groups(weight[mask], grid)
    scale, zero = torch.zeros(m, n), torch.zeros(m, n)
    nearest = torch.zeros(m, n, dtype=torch.uint8)
    kept = int(mask.sum())
    scale[mask], zero[mask] = entry_grid(kept, grid, groups)
    nearest[mask] = quantise(weight[mask], grid, *groups)
    return weight, hessian, scale, zero, mask, nearest


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping mean(diag H) I."""
    H = hessian.double()
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def output_error(codes, weight, hessian, scale, zero, mask, damping: float = 0.0) -> float:
    """sum over rows (w - q) H (w - q)^T, kept entries only."""
    error = torch.where(mask, (codes.double() - zero) * scale - weight, 0.0)
    H = damped(hessian, damping)
    return float(((error @ H) * error).sum())


def transparent(weight, hessian, scale, zero, width, mask, damping) -> torch.Tensor:
    """Equations 2 and 3 with the inverse of what is left, anew for each column; plain loops."""
    m, n = weight.shape
    H = damped(hessian, damping)
    codes = torch.zeros(m, n, dtype=torch.uint8)
    for row in range(m):
        w = weight[row].double().clone()
        for j in range(n):
            if not mask[row, j]:
                continue
            inverse = torch.linalg.inv(H[j:, j:])
            code = torch.round(w[j] / scale[row, j] + zero[row, j]).clamp(0, 2**width - 1)
            delta = w[j] - (code - zero[row, j]) * scale[row, j]
            w[j:] -= delta * inverse[0] / inverse[0, 0]
            codes[row, j] = int(code)
    return codes


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.1])
def test_equals_the_transparent_reference(width: int, density: float):
    weight, hessian, scale, zero, mask, _ = make(5, 24, width, seed=width, density=density)
    expected = transparent(weight, hessian, scale, zero, width, mask, 0.01)
    found = gptq(weight, hessian, scale, zero, width, mask, 0.01)
    assert torch.equal(found, expected)
    assert int(found[~mask].sum()) == 0


def test_blocks_join_without_a_seam():
    """More columns than two blocks hold; the reference takes one column at a time, with U."""
    n = 2 * BLOCK + 9
    weight, hessian, scale, zero, *_ = make(3, n, 3, seed=0)
    U = inverse_factor(hessian, 0.01)
    w = weight.double().clone()
    for j in range(n):
        code = (w[:, j].float() / scale[:, j] + zero[:, j]).round().clamp(0, 7)
        error = (w[:, j] - (code - zero[:, j]).double() * scale[:, j]) / U[j, j]
        w[:, j:] -= error[:, None] * U[j, j:]
        w[:, j] = code.double()
    assert torch.equal(gptq(weight, hessian, scale, zero, 3), w.to(torch.uint8))


def test_factor_is_that_of_the_inverse():
    _, hessian, *_ = make(2, 40, 2, seed=1)
    U = inverse_factor(hessian, 0.01)
    identity = torch.eye(40, dtype=torch.float64)
    assert torch.allclose(U.T @ U @ damped(hessian, 0.01), identity, rtol=0, atol=1e-10)
    assert torch.equal(U, U.triu())


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_error_of_outputs_falls(width: int, density: float):
    case = make(40, 200, width, seed=10 + width, density=density)
    *inputs, nearest = case
    before = output_error(nearest, *inputs)
    first = gptq(*inputs[:4], width, inputs[4])
    bound = {1.0: 0.5, 0.5: 0.8, 0.1: 1.0}[density]
    assert output_error(first, *inputs) < bound * before


@pytest.mark.parametrize("diagonal", [1.0, 3.7])
def test_uncorrelated_inputs_round_to_nearest(diagonal: float):
    weight, _, scale, zero, mask, nearest = make(20, 150, 3, seed=2, density=0.7)
    hessian = diagonal * torch.eye(150)
    assert torch.equal(gptq(weight, hessian, scale, zero, 3, mask), nearest)


def test_a_full_mask_is_no_mask():
    weight, hessian, scale, zero, mask, _ = make(8, 60, 2, seed=3)
    assert torch.equal(
        gptq(weight, hessian, scale, zero, 2, mask), gptq(weight, hessian, scale, zero, 2)
    )


def test_dropped_entries_take_no_part():
    """Whatever stands in a dropped entry, weight or grid, changes nothing."""
    weight, hessian, scale, zero, mask, _ = make(8, 60, 2, seed=4, density=0.5)
    plain = gptq(weight, hessian, scale, zero, 2, mask)
    other = torch.where(mask, weight, 7.0)
    grids = torch.where(mask, scale, 1.0), torch.where(mask, zero, 2.0)
    assert torch.equal(gptq(other, hessian, *grids, 2, mask), plain)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_and_repeated_inputs(damping: float):
    """Inputs that are always zero stand alone; a singular hessian is damped until it is not."""
    weight, hessian, scale, zero, mask, nearest = make(6, 30, 3, seed=7)
    hessian[4], hessian[:, 4] = 0.0, 0.0
    hessian[9], hessian[:, 9] = hessian[8], hessian[:, 8]
    hessian[9, 9] = hessian[8, 8]
    codes = gptq(weight, hessian, scale, zero, 3, mask, damping)
    assert torch.equal(codes[:, 4], nearest[:, 4])
    inputs = weight, hessian, scale, zero, mask
    assert output_error(codes, *inputs) < output_error(nearest, *inputs)
    dead = torch.zeros(30, 30)
    assert torch.equal(gptq(weight, dead, scale, zero, 3, mask, damping), nearest)


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch):
    weight, hessian, scale, zero, mask, _ = make(10, 50, 2, seed=8, density=0.7)
    whole = gptq(weight, hessian, scale, zero, 2, mask)
    monkeypatch.setattr("deltafold.coding.gptq._ROWS_BYTES", 3 * 8 * 50)
    assert torch.equal(gptq(weight, hessian, scale, zero, 2, mask), whole)


def test_inputs_are_left_as_they_were():
    weight, hessian, scale, zero, mask, nearest = make(4, 20, 2, seed=9, density=0.7)
    inputs = [weight, hessian, scale, zero, mask, nearest]
    copies = [tensor.clone() for tensor in inputs]
    gptq(weight.double(), hessian.double(), scale, zero, 2, mask)
    gptq(weight, hessian, scale, zero, 2, mask)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_small_and_empty_matrices(shape: tuple[int, int]):
    weight, grids = torch.zeros(shape), torch.ones(shape)
    hessian = torch.eye(shape[1])
    assert gptq(weight, hessian, grids, grids, 2).shape == shape


def test_what_does_not_fit_is_refused():
    weight, hessian, scale, zero, mask, _ = make(4, 20, 2, seed=9)
    with pytest.raises(ValueError, match="the hessian is"):
        gptq(weight, hessian[:9, :9], scale, zero, 2)
    with pytest.raises(ValueError, match="mask is"):
        gptq(weight, hessian, scale, zero, 2, mask[:2])
    with pytest.raises(ValueError, match="not a finite number"):
        gptq(weight, hessian * torch.nan, scale, zero, 2)
    with pytest.raises(ValueError, match="positive semidefinite"):
        indefinite = torch.eye(20)
        indefinite[0, 1] = indefinite[1, 0] = 1e15
        gptq(weight, indefinite, scale, zero, 2)
