"""The formulas of `factor`, on cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.factoring.methods import bolaco, lorc, welore
from deltafold.factoring.methods.basis import alike, likeness, neighbours, refit, shared_basis
from deltafold.factoring.methods.factors import Factored, input_gram, with_bias
from deltafold.factoring.methods.units import Unit, rank_share, ranks_for, smallest, total
from deltafold.factoring.request import FactorRequest
from deltafold.linalg import whitening
from deltafold.linalg.matrices import Moments
from deltafold.linalg.whitening import apply_root, input_root, output_error, whitened_svd


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(inputs: torch.Tensor) -> Moments:
    """Of inputs (n, i)."""
    second = inputs.T @ inputs / len(inputs)
    return Moments(second, inputs.mean(0), len(inputs))


def unit(name: str, o: int, i: int, role: str = "q", **more: object) -> Unit:
    return Unit(name, role, (0,), (name,), (o,), i, **more)  # type: ignore[arg-type]


# whitened factors


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_error_is_the_tail_of_the_whitened_spectrum(shape: tuple[int, int]) -> None:
    """Eckart and Young in the inputs' metric: no other factors of rank 5 can do better."""
    weight, inputs = random(*shape), random(400, shape[1], seed=1) @ random(shape[1], shape[1])
    gram = moments_of(inputs).second
    made = whitened_svd(weight, gram, 5, key=1, damping=1e-12)
    values = torch.linalg.svdvals(apply_root(weight, input_root(gram, 1e-12)))
    error, whole = output_error(weight, made.q @ made.a, gram)
    assert error == pytest.approx(float(values[5:].square().sum()), rel=1e-5)
    assert whole == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert torch.allclose(made.s, values[:5], rtol=1e-5)
    plain = whitened_svd(weight, None, 5, key=1)
    assert output_error(weight, plain.q @ plain.a, gram)[0] > 1.01 * error
    assert (
        output_error(weight, plain.q @ plain.a, None)[0]
        < output_error(weight, made.q @ made.a, None)[0]
    )


@pytest.mark.parametrize("known", [400, 4, 0])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_full_rank_is_the_matrix(shape: tuple[int, int], known: int) -> None:
    """Also where the inputs span four dimensions only, or none are known."""
    weight = random(*shape)
    second = moments_of(random(known, shape[1], seed=1)).second if known else None
    made = whitened_svd(weight, second, min(shape), key=1)
    assert torch.allclose(made.q @ made.a, weight, atol=1e-5)
    assert torch.allclose(made.q.T @ made.q, torch.eye(min(shape)).double(), atol=1e-6)


def test_lord_is_the_principal_components_of_the_outputs() -> None:
    """Q are the leading eigenvectors of W G W^T, and smaller ranks are cut from larger ones."""
    weight, inputs = random(6, 9), random(50, 9, seed=1)
    outputs = inputs @ weight.T
    _, vectors = torch.linalg.eigh(outputs.T @ outputs / 50)
    made = whitened_svd(weight, moments_of(inputs).second, 4, key=0, damping=1e-12)
    main = vectors.flip(1)[:, :4]
    assert torch.allclose(made.q @ made.q.T, main @ main.T, atol=1e-5)
    two = whitened_svd(weight, moments_of(inputs).second, 2, key=0, damping=1e-12)
    assert torch.allclose(made.q[:, :2], two.q, atol=1e-5)


def test_a_matrix_without_that_many_components() -> None:
    """Rank 1: what is asked for beyond is zeros, and the shapes are as asked."""
    weight = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 5))
    made = whitened_svd(weight, None, 3, key=0)
    assert made.q.shape == (6, 3) and made.a.shape == (3, 4)
    assert torch.allclose(made.q @ made.a, weight.double(), atol=1e-5)
    zero = whitened_svd(torch.zeros(6, 4), torch.eye(4), 2, key=0)
    assert not zero.a.any() and zero.q.isfinite().all()


def test_a_diagonal_and_an_indefinite_moment() -> None:
    scale = torch.tensor([4.0, 1.0, 9.0])
    assert torch.allclose(input_root(scale, 0.0), torch.tensor([2.0, 1.0, 3.0]).double())
    rough = torch.diag(scale).double()
    rough[0, 1] = rough[1, 0] = 2.0001  # rounding has made an eigenvalue negative
    assert input_root(rough).isfinite().all()
    assert torch.equal(input_root(torch.zeros(3, 3)), torch.eye(3).double())


def test_a_large_matrix_takes_the_randomised_route() -> None:
    weight = random(1100, 1100) * torch.linspace(1, 0, 1100) ** 8
    made = whitened_svd(weight, None, 40, key=3)
    best = torch.linalg.svdvals(weight)[40:].square().sum()
    assert output_error(weight, made.q @ made.a, None)[0] <= 1.02 * float(best)
    again = whitened_svd(weight, None, 40, key=3)
    assert torch.equal(made.q, again.q) and torch.equal(made.a, again.a)


def test_centring_lowers_the_error() -> None:
    """With a bias for the mean, at the same rank; and the mean of the outputs is exact."""
    weight, inputs = random(8, 10), random(300, 10, seed=1) + 2 * random(10, seed=2)
    found = moments_of(inputs)
    wanted = inputs @ weight.T

    def error(centred: bool) -> float:
        cut = whitened_svd(weight, input_gram(found, centred), 3, key=0)
        made = Factored(cut.q, cut.a)
        if centred:
            made = with_bias(weight, made, found)
        outputs = inputs @ (made.b @ made.a).T + (0 if made.bias is None else made.bias)
        if centred:
            assert torch.allclose(outputs.mean(0), wanted.mean(0), atol=1e-6)
        return float((outputs - wanted).square().sum())

    assert error(True) < 0.99 * error(False)


# a basis for several blocks


def test_basis_sharing_is_the_papers_formula() -> None:
    """S W = U s V^T: basis S^-1 U_k s_k, coefficients V_k^T; here without dividing by S."""
    weights = [random(5, 7, seed=seed) for seed in (0, 1)]
    grams = [moments_of(random(90, 7, seed=seed)).second for seed in (2, 3)]
    a, coefficients = shared_basis(weights, grams, 4, key=0, damping=1e-12)
    s_t = torch.linalg.cholesky(grams[0] + grams[1]).T  # S with S^T S = G
    u, s, vh = torch.linalg.svd(s_t @ torch.cat([w.T for w in weights], dim=1))
    basis = torch.linalg.inv(s_t) @ u[:, :4] * s[:4]
    for place, made in enumerate(coefficients):
        theirs = (basis @ vh[:4, place * 5 : place * 5 + 5]).T
        assert torch.allclose(made @ a, theirs, atol=1e-5)


def test_a_group_of_one_is_lord() -> None:
    weight, gram = random(5, 7), moments_of(random(90, 7, seed=2)).second
    a, (b,) = shared_basis([weight], [gram], 3, key=4)
    lord = whitened_svd(weight, gram, 3, key=4)
    assert torch.equal(a, lord.a) and torch.equal(b, lord.q)


@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_refit_never_raises_the_error(seed: int, rank: int, known: bool) -> None:
    weights = [random(5, 7, seed=seed), random(6, 7, seed=seed + 1)]
    grams = [moments_of(random(30, 7, seed=seed + n)).second if known else None for n in (2, 3)]
    a, coefficients = shared_basis(weights, grams, rank, key=0)
    for weight, gram, made in zip(weights, grams, coefficients, strict=True):
        before = output_error(weight, made @ a, gram)[0]
        after = output_error(weight, refit(weight, a, gram) @ a, gram)[0]
        assert after <= before * (1 + 1e-7) + 1e-12


def test_refit_helps_where_inputs_differ() -> None:
    weights = [random(5, 7, seed=0), random(5, 7, seed=1)]
    grams = [moments_of(random(30, 7, seed=n) @ random(7, 7, seed=n)).second for n in (2, 3)]
    a, coefficients = shared_basis(weights, grams, 3, key=0)
    before = output_error(weights[0], coefficients[0] @ a, grams[0])[0]
    assert output_error(weights[0], refit(weights[0], a, grams[0]) @ a, grams[0])[0] < 0.99 * before


def test_groups() -> None:
    assert neighbours([0, 1, 2, 3, 4], 2) == [(0, 1), (2, 3), (4,)]
    near = torch.tensor(
        [[1, 0.1, 0.9, 0.2], [0.1, 1, 0.3, 0.8], [0.9, 0.3, 1, 0.5], [0.2, 0.8, 0.5, 1]]
    )
    assert alike([4, 5, 6, 7], near, 2) == [(4, 6), (5, 7)]
    assert alike([4, 5, 6, 7], near, 3) == [(4, 6, 7), (5,)]
    assert alike([1, 2], near[:2, :2], 1) == [(1,), (2,)]
    assert likeness(torch.eye(3), 2 * torch.eye(3)) == pytest.approx(1)
    assert likeness(torch.tensor([1.0, 0]), torch.tensor([0, 1.0])) == 0


# ranks


def test_what_a_rank_costs() -> None:
    one = unit("a", 6, 4)
    assert (one.dense, one.per_rank, one.full, one.most) == (24, 10, 4, 2)
    assert one.rank_at(0.9) == 2 and one.rank_at(0.01) == 1 and one.rank_at(1.0) is None
    half = unit("a", 8, 8)  # half the rank of a square matrix saves nothing
    assert half.parameters(4) == half.dense and half.most == 3
    pair = Unit("a", "q", (0, 1), ("a", "b"), (6, 6), 4)
    assert (pair.dense, pair.per_rank, pair.full) == (48, 16, 4)
    assert pair.rank_at(0.5) == math.floor(2 * 4 * 6 * 0.5 / (4 + 2 * 6))  # the paper's k
    assert unit("a", 1, 64).most == 0 and unit("a", 1, 64).rank_at(0.3) is None
    biased = unit("a", 6, 4, added=6)
    assert biased.parameters(1) == 16 and biased.most == 1
    experts = Unit("e", "gate", (0,), ("a", "b", "c"), (6, 6, 6), 4, anchors=1, owns_a=True)
    assert (experts.per_rank, experts.fixed, experts.parameters(1)) == (30, 24, 54)


@given(st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=8),
       st.floats(0.3, 1.0))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ranks_keep_to_their_parameters(shapes: list[tuple[int, int]], share: float) -> None:
    units = [unit(str(n), *shape) for n, shape in enumerate(shapes)]
    wanted = int(share * sum(each.dense for each in units))
    if smallest(units) > wanted:
        with pytest.raises(ValueError, match="smallest"):
            ranks_for(units, wanted)
        return
    ranks = ranks_for(units, wanted)
    assert total(units, ranks) <= wanted
    assert 0 < rank_share(units, ranks) <= 1
    # Nothing is left that one more rank of a unit could use, unless that would make it dense.
    left = wanted - total(units, ranks)
    steps = [
        each.per_rank for each, rank in zip(units, ranks, strict=True)
        if rank is not None and rank < each.most
    ]  # fmt: skip
    assert not steps or left < 2 * max(steps)


def test_all_units_keep_the_same_share() -> None:
    units = [unit("a", 64, 64), unit("b", 128, 64), unit("c", 64, 256)]
    ranks = ranks_for(units, sum(each.dense for each in units) // 2)
    shares = [u.parameters(r) / u.dense for u, r in zip(units, ranks, strict=True)]
    assert max(shares) - min(shares) < 0.04 and total(units, ranks) <= 14336


def test_welore_by_hand() -> None:
    """Scaled to 0..1: (10, 6, 2, 0) / 10 -> 1, .6, .2, 0, and 4, 3.9, 3.8, 2 -> 1, .95, .9, 0."""
    units = [unit("a", 20, 4), unit("b", 20, 4)]
    spectra = [torch.tensor([10.0, 6, 2, 0]), torch.tensor([4, 3.9, 3.8, 2])]
    assert torch.allclose(welore.scaled(spectra[0]), torch.tensor([1, 0.6, 0.2, 0]))
    fitted = [welore.scaled(each) for each in spectra]
    assert welore.ranks_above(units, fitted, 0.5) == [2, 3]
    assert welore.ranks_above(units, fitted, 0.92) == [1, 2]
    assert welore.ranks_above(units, fitted, -1) == [None, None]  # rank 4 would save nothing
    threshold, ranks = welore.threshold_ranks(units, spectra, 5 * 24)
    assert ranks == [2, 3] and 0.2 <= threshold < 0.6
    with pytest.raises(ValueError, match="smallest"):
        welore.threshold_ranks(units, spectra, 47)


@given(st.lists(st.floats(0.2, 1), min_size=5, max_size=5))
@settings(max_examples=40, deadline=None)
def test_bolaco_holds_the_total(weights: list[float]) -> None:
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (96, 64),
              "up": (96, 64), "down": (64, 96)}  # fmt: skip
    units = [unit(f"{role}{n}", *s, role=role) for n in range(4) for role, s in shapes.items()]
    assert bolaco.groups_of(units) == list(bolaco.GROUPS)
    wanted = int(0.6 * sum(each.dense for each in units))
    ranks = bolaco.split_ranks(units, dict(zip(bolaco.GROUPS, weights, strict=True)), wanted)
    kept = total(units, ranks)
    assert wanted * 0.985 < kept <= wanted
    values = [rank for each, rank in zip(units, ranks, strict=True) if each.role == "v"]
    assert values == [None] * 4
    assert set(bolaco.shares_of(units, ranks)) == set(bolaco.GROUPS)
    assert bolaco.fewest(units) == 4 * 32 * 64 + smallest([u for u in units if u.role != "v"])


def test_lorc_by_hand() -> None:
    """Log condition numbers 1, 2, 3 from block 0 on: cumulative 6, 5, 3."""
    assert lorc.log_condition(torch.tensor([math.e**2, 1.0])) == pytest.approx(2)
    found = lorc.schedule({0: [1.0], 1: [1.0, 1.0], 2: [3.0]}, least=0.4)
    assert found == pytest.approx({0: 1.0, 1: 1 - 1 / 3 * 0.6, 2: 0.4})
    assert lorc.schedule({3: [2.0]}) == {3: 1.0}


def test_the_damping_that_is_asked_for_is_that_of_the_whitening() -> None:
    assert FactorRequest("model", "output").damping == whitening.DAMPING
