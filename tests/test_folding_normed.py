"""Least squares through a norm, on rows made up by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from deltafold.folding.methods.normed import Ending, Rows, heal_normed
from deltafold.folding.methods.norms import Norm


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(states: torch.Tensor) -> torch.Tensor:
    return states / states.square().mean(-1, keepdim=True).sqrt()


def made(true: Ending, seed: int = 1, rows: int = 400) -> Rows:
    """Rows whose targets are what the true ending makes of them."""
    x, stream = normal(rows, true.weight.shape[0], seed=seed), normal(rows, 3, seed=seed + 1)
    target = stream + true.gain * rms(x @ true.weight)
    return Rows(x, stream, target, torch.arange(rows) % 4 == 0)


def healed(start: Ending, rows: Rows) -> tuple[Ending, float, float]:
    def twice() -> Iterator[Rows]:
        for part in (slice(0, 150), slice(150, None)):
            yield Rows(rows.x[part], rows.stream[part], rows.target[part], rows.held[part])

    found, before, after, _ = heal_normed(start, twice)
    return found, before, after


def test_an_error_by_hand() -> None:
    """x W = (3, 4), n = (3, 4) / sqrt(12.5), h' = (1, 1) + (2, 1) n; of two rows the held one counts."""
    ending = Ending(torch.eye(2), torch.tensor([2.0, 1.0]), rms)
    x, stream = torch.tensor([[3.0, 4.0]] * 2), torch.ones(2, 2)
    target = torch.tensor([[0.0, 5.0], [3.0, 4.0]])
    rows = Rows(x, stream, target, torch.tensor([False, True]))
    one, two = 1 + 6 / 12.5**0.5 - 3, 1 + 4 / 12.5**0.5 - 4
    assert ending.error([rows]) == pytest.approx((one**2 + two**2) / 25, rel=1e-5)


def test_gains_that_were_lost_are_found() -> None:
    true = Ending(normal(5, 3), torch.tensor([2.0, -0.5, 1.5]), rms)
    found, before, after = healed(replace(true, gain=torch.ones(3)), made(true))
    assert before > 0.2 and after < 1e-3 * before
    assert torch.allclose(found.gain, true.gain, atol=0.05)


def test_a_projection_is_found_up_to_the_length_that_the_norm_takes_away() -> None:
    true = Ending(normal(5, 3), torch.tensor([2.0, 0.7, 1.5]), rms)
    start = replace(true, weight=true.weight + 0.3 * normal(5, 3, seed=8), gain=true.gain * 0.6)
    rows = made(true)
    found, before, after = healed(start, rows)
    assert after < 0.05 * before
    near = torch.nn.functional.cosine_similarity(rows.x @ found.weight, rows.x @ true.weight, dim=1)
    assert float(near.mean()) > 0.99


def test_a_projection_with_too_many_inputs_is_changed_after_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W S with S (w, w): what was turned is turned back."""
    monkeypatch.setattr("deltafold.folding.methods.normed.WIDEST", 4)
    true = Ending(normal(5, 3), torch.ones(3), rms)
    turned = torch.eye(3) + 0.4 * normal(3, 3, seed=4)
    start = replace(true, weight=true.weight @ turned)
    found, before, after = healed(start, made(true))
    assert after < 0.05 * before
    inside = torch.linalg.lstsq(true.weight, found.weight).solution
    assert torch.allclose(true.weight @ inside, found.weight, atol=1e-4)


def test_nothing_is_changed_where_nothing_helps() -> None:
    true = Ending(normal(5, 3), torch.ones(3), rms)
    rows = made(true)
    found, before, after = healed(true, rows)
    assert before == after == pytest.approx(0, abs=1e-9) and found is true


def test_a_norm_that_stores_its_gain_less_one() -> None:
    tensors = {"norm.weight": torch.tensor([0.5, -1.0]), "norm.bias": torch.tensor([3.0, 4.0])}
    norm = Norm("norm.weight", "norm.bias", offset=1.0)
    assert norm.gain(tensors.__getitem__).tolist() == [1.5, 0.0]
    assert norm.shift(tensors.__getitem__).tolist() == [3.0, 4.0]
    assert Norm("norm.weight").shift(tensors.__getitem__).tolist() == [0.0, 0.0]
    least = 1e-3 * (1.5**2 / 2) ** 0.5
    assert norm.divisor(tensors.__getitem__).tolist() == pytest.approx([1.5, least])
