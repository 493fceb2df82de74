"""Truncated SVD: within one per cent of the optimum, by every route; the noise edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltafold.linalg.decomposition import is_randomised, noise_edge, truncated_svd
from deltafold.linalg.matrices import DenseMatrix


def matrix(o: int, i: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Singular values index^-decay, random orthogonal factors."""
    generator = torch.Generator().manual_seed(seed)
    r = min(o, i)
    u = torch.linalg.qr(torch.randn(o, r, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(i, r, generator=generator, dtype=torch.float64)).Q
    return ((u * torch.arange(1, r + 1).double().pow(-decay)) @ v.T).float()


@pytest.fixture(autouse=True)
def small_matrices_take_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafold.linalg.decomposition.SMALL_SIDE", 100)


CASES = [
    (300, 120, 30),  # tall, Gram
    (120, 300, 30),  # wide, Gram
    (120, 120, 120),  # full rank
    (700, 600, 20),  # randomised
    (320, 900, 8),  # randomised, wide
]


@pytest.mark.parametrize(("o", "i", "rank"), CASES)
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_error_is_within_one_per_cent_of_the_optimum(o: int, i: int, rank: int, decay: float):
    d = matrix(o, i, decay)
    found = truncated_svd(DenseMatrix(d), rank, key=1)
    approximation = (found.u * found.s) @ found.v.T
    error = float((d - approximation).norm())
    optimum = float(torch.linalg.svdvals(d.double())[rank:].norm())
    assert error <= 1.01 * optimum + 1e-5


def test_both_routes_are_taken():
    assert is_randomised((700, 600), 20) and is_randomised((320, 900), 8)
    assert not is_randomised((300, 120), 30)


def test_small_sides_are_never_sketched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deltafold.linalg.decomposition.SMALL_SIDE", 1024)
    assert not is_randomised((49152, 576), 4)
    assert is_randomised((8192, 2048), 100)


@pytest.mark.parametrize(("o", "i", "rank"), CASES)
def test_factors_are_singular_triplets(o: int, i: int, rank: int):
    d = matrix(o, i, 0.7)
    found = truncated_svd(DenseMatrix(d), rank, key=1)
    eye = torch.eye(found.rank)
    assert torch.allclose(found.u.T @ found.u, eye, atol=2e-3)
    assert torch.allclose(found.v.T @ found.v, eye, atol=2e-3)
    true = torch.linalg.svdvals(d)[:rank]
    assert torch.allclose(found.s, true, rtol=0.02)
    assert bool((found.s[:-1] >= found.s[1:] - 1e-6).all())


def test_rank_deficient_matrices_give_only_what_is_there():
    d = matrix(60, 3, 1.0) @ matrix(3, 50, 0.0)
    found = truncated_svd(DenseMatrix(d), 20, key=0)
    assert found.rank == 3
    assert truncated_svd(DenseMatrix(torch.zeros(40, 30)), 5, key=0).rank == 0


def test_signs_are_fixed():
    d = matrix(50, 40, 1.0)
    a = truncated_svd(DenseMatrix(d), 5, key=0)
    assert bool((a.v[a.v.abs().argmax(0), torch.arange(5)] > 0).all())


def test_reading_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    d = matrix(300, 120, 0.5)
    whole = truncated_svd(DenseMatrix(d), 10, key=0)
    monkeypatch.setattr("deltafold.linalg.decomposition.CHUNK_BYTES", 120 * 8 * 7)
    pieces = truncated_svd(DenseMatrix(d), 10, key=0)
    assert torch.allclose(whole.u, pieces.u, atol=1e-5)
    assert torch.allclose(whole.s, pieces.s, rtol=1e-6)


def test_noise_stays_under_its_edge_and_a_spike_does_not():
    noise = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)) * 0.01
    edge = noise_edge((400, 300), float(noise.square().sum()))
    assert float(torch.linalg.svdvals(noise)[0]) == pytest.approx(edge, rel=0.03)
    spike = noise + 2 * edge * torch.outer(matrix(400, 1, 0)[:, 0], matrix(300, 1, 0, 1)[:, 0])
    top = float(torch.linalg.svdvals(spike)[0])
    assert top > 1.5 * noise_edge((400, 300), float(spike.square().sum()))


def test_noise_edge_by_hand():
    assert noise_edge((4, 4), 16.0) == pytest.approx(4.0)  # sigma 1, 2 + 2
    assert np.isfinite(noise_edge((1, 1), 0.0))
