"""Each codec against its paper's formula, on cases worked by hand or computed the plain way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_codecs import decoded, delta, encoded

from deltafold.codecs import delta_codec
from deltafold.codecs.impart import kept_counts, sparsity
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix


def algorithm_1(s: np.ndarray, o: int, i: int, ratio: float, beta: float, c: float) -> np.ndarray:
    """ImPart's Algorithm 1, line by line as in the paper; p of all k components."""
    R = min(o, i)
    alpha = 1 - o * i / (ratio * R * (o + i))
    gamma = (alpha - beta) / (1 - beta)
    k = int(R * (1 - beta))
    p = (1 - (s[:k] / s[0]) ** c) * gamma
    last = k
    while p.mean() < gamma:
        last -= 1
        p[last] = 1.0
    return p


def falling(R: int, decay: float) -> np.ndarray:
    return np.arange(1, R + 1, dtype=float) ** -decay


@pytest.mark.parametrize(("o", "i"), [(2048, 2048), (512, 2048), (2048, 512), (192, 576)])
@pytest.mark.parametrize("ratio", [8, 32, 128])
@pytest.mark.parametrize(("beta", "c"), [(0.6, 1.0), (0.6, 0.5), (0.7, 1.0), (0.8, 0.5)])
@pytest.mark.parametrize("decay", [0.2, 0.5, 1.0])
def test_impart_sparsity_equals_algorithm_1(o, i, ratio, beta, c, decay):
    s = falling(min(o, i), decay)
    expected = algorithm_1(s, o, i, ratio, beta, c)
    found = sparsity((o, i), 1 / ratio, s, beta, c)
    active = len(found.p)
    np.testing.assert_allclose(found.p, expected[:active], rtol=1e-12)
    assert np.all(expected[active:] == 1.0)


@pytest.mark.parametrize("shape", [(2048, 2048), (512, 2048)])
@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_impart_mean_sparsity_meets_the_target(shape, decay):
    """At the default settings the mean is within 1e-3 of gamma, never below."""
    found = sparsity(shape, 1 / 32, falling(min(shape), decay), 0.6, 1.0)
    mean = 1 - (1 - found.p).sum() / found.components
    assert 0 <= mean - found.gamma + 1e-12 < 1e-3


@pytest.mark.parametrize("shape", [(2048, 2048), (512, 2048), (64, 48)])
@pytest.mark.parametrize(("beta", "c"), [(0.6, 1.0), (0.7, 0.5), (0.8, 0.5)])
def test_impart_mean_sparsity_overshoots_by_less_than_a_component(shape, beta, c):
    """Algorithm 1 drops whole components until the mean is reached: one too many at most."""
    s = falling(min(shape), 0.5)
    found = sparsity(shape, 1 / 32, s, beta, c)
    mean = 1 - (1 - found.p).sum() / found.components
    next_p = (1 - (s[len(found.p)] / s[0]) ** c) * found.gamma
    assert 0 <= mean - found.gamma + 1e-12 <= (1 - next_p) / found.components + 1e-12


def test_impart_by_hand():
    """o = i = 10, ratio 2.5, beta 0.5, C 1, s = (4, 2, 2, 1, 1, ...).

    alpha = 1 - 100 / (2.5 * 10 * 20) = 0.8; k = 5; gamma = 0.3 / 0.5 = 0.6
    p     = 0.6 * (0, 1/2, 1/2, 3/4, 3/4) = 0, .3, .3, .45, .45: mean .30 < .6
    set p_5 = 1: mean .41; p_4 = 1: mean .52; p_3 = 1: mean .66 >= .6: two components stay
    kept  = 10 - int(10 * 0), 10 - int(10 * .3) = 10, 7
    """
    s = np.array([4, 2, 2, 1, 1, 1, 1, 1, 1, 1.0])
    found = sparsity((10, 10), 1 / 2.5, s, 0.5, 1.0)
    assert found.components == 5
    assert found.alpha == pytest.approx(0.8) and found.gamma == pytest.approx(0.6)
    np.testing.assert_allclose(found.p, [0.0, 0.3], atol=1e-12)
    assert kept_counts(found.p, 10).tolist() == [10, 7]


def test_impart_prefix_of_the_spectrum_is_enough():
    s = falling(2048, 0.5)
    whole = sparsity((2048, 2048), 1 / 64, s, 0.6, 1.0)
    prefix = sparsity((2048, 2048), 1 / 64, s[: len(whole.p) + 1], 0.6, 1.0)
    np.testing.assert_array_equal(whole.p, prefix.p)
    codec = delta_codec("impart")
    assert codec.components_used((2048, 2048), 1 / 64, s[: len(whole.p) + 1]) == len(whole.p) + 1
    assert codec.components_used((2048, 2048), 1 / 64, s[: len(whole.p)]) is None


def test_impart_counts_of_kept_entries_follow_p():
    d = delta(256, 192)
    codec = delta_codec("impart")
    chosen, parts = encoded(codec, d, 1 / 16)
    s = torch.linalg.svdvals(d.double()).numpy()
    p = algorithm_1(s, 256, 192, 16, 0.6, 1.0)
    active = chosen["active"]
    assert np.all(p[active:] == 1.0)
    # The codec's own singular values are float32: a count may differ by one at an integer edge.
    assert np.abs(parts["kept"][0].numpy() - (256 - (256 * p[:active]).astype(int))).max() <= 1
    assert np.abs(parts["kept"][1].numpy() - (192 - (192 * p[:active]).astype(int))).max() <= 1
    assert parts["kept"][0, 0] == 256, "the first component is kept whole"


def test_impart_is_unbiased_over_seeds():
    """The mean over seeds approaches the truncated delta at the rate of independent draws."""
    d = delta(64, 48)
    codec = delta_codec("impart", {"beta": 0.5})
    factors = truncated_svd(DenseMatrix(d), 48, 0)
    chosen = codec.settings_for((64, 48), 0.2, factors.s.double().numpy())
    active = chosen["active"]
    truth = (factors.u[:, :active] * factors.s[:active]) @ factors.v[:, :active].T
    draws = []
    for key in range(400):
        settings, parts = codec.encode(DenseMatrix(d), chosen, key * 1000, factors)
        draws.append(decoded(codec, parts, settings, (64, 48), key * 1000))
    stack = torch.stack(draws)
    spread = float((stack - truth).square().mean().sqrt())
    bias = float((stack.mean(0) - truth).square().mean().sqrt())
    assert bias < 1.3 * spread / 400**0.5
    assert spread > 0.1 * float(truth.square().mean().sqrt()), "something was drawn at all"


def test_impart_large_share_is_plain_truncation():
    found = sparsity((64, 64), 1.0, falling(64, 0.5), 0.6, 1.0)  # alpha = 0.5 < beta
    assert found.gamma == 0.0 and len(found.p) == 32 and not found.p.any()


def test_lowrank_is_the_best_approximation_of_its_rank():
    d = delta(60, 40)
    chosen, parts = encoded(delta_codec("lowrank"), d, 1 / 4)
    assert chosen["rank"] == int(60 * 40 / (4 * 100)) == 6
    u, s, vh = torch.linalg.svd(d.double())
    best = (u[:, :6] * s[:6]) @ vh[:6]
    found = decoded(delta_codec("lowrank"), parts, chosen, (60, 40), 1)
    assert float((found - best).norm() / best.norm()) < 1e-3


def test_dare_keeps_values_times_ratio():
    d = delta(50, 40)
    codec = delta_codec("dare")
    chosen, parts = encoded(codec, d, 1 / 8)
    assert chosen["kept"] == 50 * 40 / 8
    found = decoded(codec, parts, chosen, (50, 40), 1)
    kept = found != 0
    assert int(kept.sum()) == 250
    torch.testing.assert_close(found[kept], 8 * d[kept], rtol=2e-3, atol=1e-7)


def test_dare_is_unbiased_over_seeds():
    d = delta(30, 20)
    codec = delta_codec("dare")
    total = torch.zeros(30, 20)
    for key in range(600):
        chosen, parts = encoded(codec, d, 0.25, key)
        total += decoded(codec, parts, chosen, (30, 20), key)
    spread = d.norm() * (3**0.5)  # variance of a kept-with-1/4, times 4
    assert float((total / 600 - d).norm()) < 1.2 * float(spread) / 600**0.5


def test_magnitude_keeps_the_largest():
    d = delta(50, 40)
    codec = delta_codec("magnitude")
    chosen, parts = encoded(codec, d, 0.1)
    found = decoded(codec, parts, chosen, (50, 40), 1)
    order = d.abs().reshape(-1).argsort(descending=True)
    expected = torch.zeros(2000)
    expected[order[:200]] = d.reshape(-1)[order[:200]]
    torch.testing.assert_close(found.reshape(-1), expected, rtol=2e-3, atol=1e-8)


def test_magnitude_breaks_ties_by_position():
    d = torch.zeros(20, 16)
    d[3:9] = 0.5
    codec = delta_codec("magnitude")
    chosen, parts = encoded(codec, d, 40 / 320)
    found = decoded(codec, parts, chosen, (20, 16), 1)
    assert torch.nonzero(found.reshape(-1)).reshape(-1).tolist() == list(range(48, 88))
