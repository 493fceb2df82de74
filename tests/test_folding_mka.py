"""MKA's manifolds and their mutual information; what its released program gets wrong."""

from __future__ import annotations

import math

import pytest
import torch

from deltafold.folding.methods import mka


def cloud(n: int, w: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, w, generator=torch.Generator().manual_seed(seed)).double()


def information(x: torch.Tensor, y: torch.Tensor, neighbours: int = mka.NEIGHBOURS) -> float:
    """Mutual information of two columns (n,)."""
    gaps = mka.gaps_of(torch.stack([x, y], dim=1))
    return mka.mutual_information(gaps[0], gaps[1], neighbours)


def test_the_operator_by_hand() -> None:
    """Two rows at distance 2, sigma 8, e 1/2: K = [[1, q], [q, 1]], q = exp(-1/2); A = K / (1 + q)."""
    made = mka.diffusion_matrix(torch.tensor([[0.0], [2.0]]), sigma=8.0)
    q = math.exp(-((2 / 8) ** 0.5))
    wanted = torch.tensor([[1, q], [q, 1]]).double() / (1 + q)
    assert torch.allclose(made, wanted, atol=1e-12)


def test_the_largest_eigenvalue_is_one_and_the_operator_is_symmetric() -> None:
    made = mka.diffusion_matrix(cloud(30))
    assert torch.allclose(made, made.T, atol=1e-14)
    assert torch.linalg.eigvalsh(made)[-1] == pytest.approx(1)


def test_the_kernel_depends_on_every_sample() -> None:
    """The released program looks at the first tokens of one sample."""
    rows = cloud(12)
    before = mka.diffusion_matrix(rows)
    for number in range(12):
        moved = rows.clone()
        moved[number] += 1
        assert (mka.diffusion_matrix(moved) - before).abs().max() > 1e-4, number


def test_a_prime_number_of_samples_is_no_special_case() -> None:
    """With 101 samples the released program's kernel is constant."""
    made = mka.diffusion_matrix(cloud(101))
    assert made.std() > 1e-4
    states = torch.stack([cloud(101), cloud(101) + 0.1 * cloud(101, seed=1), cloud(101, seed=2)])
    alike = mka.npib(states)
    assert alike[0, 1] > alike[0, 2] + 0.1


def test_a_manifold_finds_the_order_of_points_on_a_line() -> None:
    line = torch.linspace(0, 1, 40)[:, None].double()
    first = mka.embedding(line, dimensions=1, exponent=2.0)[:, 0]
    steps = first.diff()
    assert (steps > 0).all() or (steps < 0).all()


def test_ranks() -> None:
    found = mka.ranks(torch.tensor([[5.0, 1], [2, 1], [9, 0]]))
    assert found[:, 0].tolist() == pytest.approx([1.5 / 3, 0.5 / 3, 2.5 / 3])
    assert found[:, 1].tolist() == pytest.approx([1.5 / 3, 2.5 / 3, 0.5 / 3])


def test_mutual_information_is_that_of_scikit_learn() -> None:
    regression = pytest.importorskip("sklearn.feature_selection")
    x = cloud(200, 1)[:, 0]
    for y in (x + 0.5 * cloud(200, 1, 3)[:, 0], cloud(200, 1, 4)[:, 0].abs() + x):
        wanted = regression.mutual_info_regression(
            x[:, None].numpy(), y.numpy(), n_neighbors=5, random_state=0
        )
        # scikit-learn scales both, which moves the maximum norm: scale them here too.
        found = information(x / x.std(correction=0), y / y.std(correction=0), 5)
        assert found == pytest.approx(float(wanted[0]), abs=2e-3)


def test_mutual_information_of_gaussians() -> None:
    """I = -log(1 - r^2) / 2; independent columns have none."""
    x, noise = cloud(800, 1)[:, 0], cloud(800, 1, 5)[:, 0]
    y = 0.8 * x + 0.6 * noise
    assert information(x, y) == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.08)
    assert information(x, noise) < 0.05


def test_entropies_follow_the_points() -> None:
    """Uniform on [0, c): log c. The released program's entropies are one constant."""
    points = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)).double()
    uniform = mka.entropy(points, 5, volume=True)
    assert uniform == pytest.approx(0, abs=0.05)
    assert mka.entropy(3 * points, 5, volume=True) == pytest.approx(uniform + math.log(3), abs=1e-9)
    assert mka.entropy(points, 5, volume=True) - mka.entropy(points, 5) == pytest.approx(
        math.log(2), abs=1e-6
    )


def test_the_bounded_normaliser() -> None:
    """S = sqrt(1 - exp(-2 I)), the mean I over the pairs of columns."""
    states = torch.stack([cloud(60), cloud(60) + 0.2 * cloud(60, seed=7)])
    one, two = mka.embeddings(states)
    pairs = [information(one[:, a], two[:, b]) for a in (0, 1) for b in (0, 1)]
    wanted = math.sqrt(1 - math.exp(-2 * sum(pairs) / 4))
    found = mka.npib(states)
    assert found[0, 1] == pytest.approx(wanted) and 0 < wanted < 1
    assert (found <= 1).all()


def test_the_quotient_of_the_reference() -> None:
    states = torch.stack([cloud(60), cloud(60) + 0.2 * cloud(60, seed=7)])
    one, two = mka.embeddings(states, "reference")
    pairs = [information(one[:, a], two[:, b]) for a in (0, 1) for b in (0, 1)]
    sizes = abs(mka.entropy(one)) * abs(mka.entropy(two))
    found = mka.npib(states, "reference")
    assert found[0, 1] == pytest.approx(sum(pairs) / 4 / math.sqrt(sizes))


def test_the_reference_ratio_lies_between_a_half_and_0_73() -> None:
    alike = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 98]]).double()
    low, high = mka.reference_ratio(alike, 0, 2), mka.reference_ratio(alike, 2, 0)
    assert 0.5 < low < 0.51 and 0.72 < high < 1 / (1 + math.exp(-1))
    assert mka.reference_ratio(alike, 0, 1) == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_too_few_samples_for_a_manifold() -> None:
    with pytest.raises(ValueError, match="at least 4 rows"):
        mka.npib(cloud(9).reshape(3, 3, 5))


def test_equal_rows_give_numbers() -> None:
    """All texts alike: nothing to tell apart, but no NaN either."""
    assert mka.npib(torch.ones(2, 8, 3)).isfinite().all()
