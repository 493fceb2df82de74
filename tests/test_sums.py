"""Products of factors: the fp32 results are those of the sum in order, whatever the library adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltafold.coding import correction, sums
from deltafold.coding.sums import product_rows


def in_order(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for x, y in zip(left.double(), right.double(), strict=True):
        total = total + x[:, None] * y
    return total.float()


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows for _, rows in product_rows(left, right)])


def mm(order: str):
    """A library that adds in another order."""

    def multiplied(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        j = torch.arange(x.shape[1]).flip(0) if order == "backwards" else None
        found = x @ y if j is None else in_order_of(x[:, j], y[j])
        return out.copy_(found)

    def in_order_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[0], y.shape[1], dtype=x.dtype)
        for column, row in zip(x.T, y, strict=True):
            total = total + column[:, None] * row
        return total

    return multiplied


def near_a_border(r: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """1 + 2^-24, half way between two fp32, and terms too small for fp64 to add to it one by one.

    Backwards they add up first, and the sum rounds to the other neighbour.
    """
    left = torch.full((r, 24), 2.0**-27)
    right = torch.full((r, 16), 2.0**-27)
    left[0] = right[0] = 1.0
    left[1] = right[1] = 2.0**-12
    return left, right


def test_the_case_hangs_on_the_order() -> None:
    left, right = near_a_border()
    forwards, backwards = in_order(left, right), in_order(left.flip(0), right.flip(0))
    assert float(forwards[0, 0]) == 1.0 and float(backwards[0, 0]) == 1.0 + 2.0**-23


@pytest.mark.parametrize("order", ["torch's", "backwards"])
@pytest.mark.parametrize("case", ["near a border", "usual", "few bits", "sparse", "none"])
def test_the_sum_is_that_in_order(case: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(30, 70, generator=generator) * torch.arange(1, 31)[:, None] ** -0.8
    right = torch.randn(30, 90, generator=generator).half().float()
    if case == "near a border":
        left, right = near_a_border()
    if case == "few bits":  # products of few bits end on borders of rounding often
        left, right = (left * 4).round() * (1 + 2.0**-20), (right * 4).round() * (1 + 2.0**-10)
    if case == "sparse":
        left[torch.rand(left.shape, generator=generator) < 0.95] = 0
    if case == "none":
        left, right = left[:0], right[:0]
    monkeypatch.setattr(sums.torch, "mm", mm(order))
    monkeypatch.setattr(sums, "_VALUES", 1000)
    assert torch.equal(product(left, right), in_order(left, right))


def test_few_entries_are_added_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    real = sums._one_by_one
    monkeypatch.setattr(
        sums, "_one_by_one", lambda x, y, a, b: again.append(len(a)) or real(x, y, a, b)
    )
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(50, 1000, generator=generator)
    product(left, torch.randn(50, 1000, generator=generator))
    assert sum(again) < 1e-3 * 1000 * 1000


def test_a_correction_is_summed_in_order() -> None:
    generator = np.random.default_rng(0)
    left, right = (generator.integers(-127, 128, (4, n)).astype(np.int8) for n in (30, 50))
    scales = [torch.from_numpy(generator.random((4, 1)).astype(np.float32)) for _ in range(2)]
    found = correction.Correction(*scales, torch.from_numpy(left), torch.from_numpy(right))
    wide = [torch.from_numpy(x).double() * s for x, s in zip((left, right), scales, strict=True)]
    assert torch.equal(found.rows(10, 30), in_order(wide[0][:, 10:30], wide[1]))
