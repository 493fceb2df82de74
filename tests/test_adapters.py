"""Pairs, ranks and the files of adapters, on cases worked by hand; no model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from deltafold.errors import BudgetError, UsageError
from deltafold.exporting.engines import vllm_rank
from deltafold.exporting.gguf_files import interleaved
from deltafold.exporting.methods.pairs import squared_error, stored_pair, svd_pair
from deltafold.exporting.methods.ranks import Choice, bytes_ranks, energy_rank
from deltafold.exporting.peft_files import adapter_config, pair_tensors, target_modules
from deltafold.exporting.places import Layout, Place
from deltafold.linalg.matrices import Moments


def product(pair_a: torch.Tensor, pair_b: torch.Tensor) -> torch.Tensor:
    return pair_b.T @ pair_a


def test_the_best_pair_of_rank_one() -> None:
    """diag(3, 4): the 4 stays, and 3^2 is lost; its root, 2, stands in both matrices."""
    delta = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    pair = svd_pair(delta, 1, key=1)
    assert torch.allclose(product(pair.a, pair.b), torch.diag(torch.tensor([0.0, 4.0])), atol=1e-6)
    assert torch.allclose(pair.a.abs(), torch.tensor([[0.0, 2.0]]), atol=1e-6)
    assert torch.allclose(pair.b.abs(), torch.tensor([[0.0, 2.0]]), atol=1e-6)
    assert squared_error(delta, pair.a, pair.b) == pytest.approx(9.0)


def test_inputs_decide_what_is_kept() -> None:
    """Inputs of energy 4 and 1: 3 sqrt(4) is more than 4 sqrt(1), so the 3 stays."""
    delta = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    moments = Moments(torch.diag(torch.tensor([4.0, 1.0])), torch.zeros(2), 10)
    pair = svd_pair(delta, 1, key=1, moments=moments)
    assert torch.allclose(product(pair.a, pair.b), torch.diag(torch.tensor([3.0, 0.0])), atol=1e-5)
    whole = svd_pair(delta, 2, key=1, moments=moments)
    assert torch.allclose(product(whole.a, whole.b), delta, atol=1e-5)


def test_whitening_is_better_for_outputs() -> None:
    """E |D x - B A x|^2 over the inputs themselves; worse than plain SVD it must never be."""
    torch.manual_seed(0)
    delta, x = torch.randn(24, 16), torch.randn(400, 16) * torch.linspace(0.05, 3, 16)
    moments = Moments(x.T @ x / len(x), x.mean(0), len(x))
    losses = []
    for known in (None, moments):
        pair = svd_pair(delta, 4, 1, known)
        losses.append(float((x @ (delta - product(pair.a, pair.b)).T).square().sum()))
    assert losses[1] < 0.9 * losses[0]


def test_stored_factors_stay_as_they_are() -> None:
    left, right = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 8.0]]), torch.eye(3)
    pair = stored_pair(left, right)
    assert torch.allclose(product(pair.a, pair.b), left.T @ right)
    assert pair.s.tolist() == [8.0, 2.0]  # nothing is kept of the component that is zero
    assert torch.allclose(pair.a.norm(dim=1), pair.b.norm(dim=1))


def test_energy_and_bytes() -> None:
    assert energy_rank([3.0, 2.0, 1.0], 14.0, 9 / 14) == 1
    assert energy_rank([3.0, 2.0, 1.0], 14.0, 1.0) == 3
    spectra = {"x": [4.0, 1.0], "y": [3.0, 2.9]}
    assert bytes_ranks(spectra, {"x": 10, "y": 10}, 30) == {"x": 1, "y": 2}
    # y costs five times as much: 3^2 / 50 is worth less than 1 / 10 would be, but more than that
    assert bytes_ranks(spectra, {"x": 10, "y": 50}, 69) == {"x": 1, "y": 1}
    refused(BudgetError, lambda: bytes_ranks(spectra, {"x": 10, "y": 10}, 9), "--bytes")


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=1, max_size=5),
    st.integers(20, 400),
)
def test_bytes_are_never_exceeded(lists: list[list[float]], n_bytes: int) -> None:
    spectra = {str(n): sorted(each, reverse=True) for n, each in enumerate(lists)}
    costs = {name: 7 + 3 * n for n, name in enumerate(spectra)}
    ranks = bytes_ranks(spectra, costs, n_bytes)
    spent = sum(ranks[name] * costs[name] for name in spectra)
    assert spent <= n_bytes
    for name, s in spectra.items():  # and no further component would have fitted
        assert ranks[name] == len(s) or spent + costs[name] > n_bytes


def test_one_way_to_choose() -> None:
    refused(UsageError, lambda: Choice(rank=4, energy=0.5), "--rank")
    refused(UsageError, lambda: Choice(rank=0), "at least 1")
    refused(UsageError, lambda: Choice(energy=1.5), "--energy")


def test_targets_are_named_as_briefly_as_is_right() -> None:
    modules = dict.fromkeys(("m.0.q", "m.1.q", "m.0.k", "m.1.k", "head"), "linear")
    named = target_modules(["m.0.q", "m.1.q", "m.1.k", "head"], modules)  # type: ignore[arg-type]
    assert named == ["head", "m.1.k", "q"]


def test_config_of_mixed_ranks() -> None:
    modules = {f"m.{n}.q": "linear" for n in range(3)}
    layout = Layout({}, modules, False, "m.embed", "llama", {})  # type: ignore[arg-type]
    config = adapter_config("base/", layout, {"m.0.q": 4, "m.1.q": 2, "m.2.q": 4}, [])
    assert config["r"] == config["lora_alpha"] == 4 and config["target_modules"] == ["q"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"m\.1\.q": 2}
    assert "modules_to_save" not in config and "ensure_weight_tying" not in config


def test_an_embedding_is_looked_up_in_a() -> None:
    """PEFT: row of id n = (A^T)[n] B^T, so that A holds the vocabulary."""
    a, b = torch.randn(2, 5), torch.randn(2, 7)  # width 5, vocabulary 7
    tensors = pair_tensors(Place("m.embed", "embedding", rest=True), a, b)
    first, second = (tensors[f"base_model.model.m.embed.lora_embedding_{x}"] for x in "AB")
    assert first.shape == (2, 7) and second.shape == (5, 2)
    assert torch.allclose(first.T @ second.T, b.T @ a)


def test_rows_of_rotary_heads() -> None:
    """One head of 4: halves (0, 1), (2, 3) become neighbours (0, 2), (1, 3)."""
    rows = torch.arange(8.0)[:, None]
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    torch.manual_seed(0)
    w, b, a = torch.randn(8, 6), torch.randn(8, 2), torch.randn(2, 6)
    assert torch.allclose(interleaved(w + b @ a, 2), interleaved(w, 2) + interleaved(b, 2) @ a)


def test_ranks_of_vllm() -> None:
    assert [vllm_rank(rank) for rank in (1, 8, 9, 257, 512)] == [8, 8, 16, 320, 512]
    refused(UsageError, lambda: vllm_rank(513), "512")
