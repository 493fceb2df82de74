"""The quantised codecs against their papers, computed the plain way: loops, fp64, no shared code.

What decoding gives is compared with references that know only the stored bits, the page of the
format and numpy; GPTQ with the textbook loop that updates an explicit inverse.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_codecs import decoded, delta, encoded

from deltafold.codecs import delta_codec
from deltafold.codecs.impart_qt import power
from deltafold.coding.coded_vectors import bands, code_across
from deltafold.coding.counter import kept_positions, subset
from deltafold.errors import UsageError
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix, Factors, Moments

KEY = 12345
QUANTISED = ("bitdelta", "dare-qt", "svd-quant", "delta-come", "impart-qt")


def bits_of(part: torch.Tensor) -> str:
    return "".join(f"{byte:08b}" for byte in part.tolist())


def levels(codes: str, scales: list[float], count: int, width: int) -> np.ndarray:
    """Values of one run of codes, one by one: (code - (2^w - 1) / 2) times the group's scale."""
    middle = (2**width - 1) / 2
    return np.array(
        [
            (int(codes[n * width : (n + 1) * width], 2) - middle) * scales[n // 128]
            for n in range(count)
        ]
    )


def plain_gptq(w: np.ndarray, h: np.ndarray, nearest, kept: np.ndarray) -> np.ndarray:
    """Levels of w (m x n): after each column the inverse of H over the later ones is made anew.

    `nearest(row, column, value)` is the level of one entry; h must be damped.
    """
    w, q = w.astype(np.float64).copy(), np.zeros(w.shape)
    n = w.shape[1]
    for j in range(n):
        inverse = np.linalg.inv(h[j:, j:])
        for row in range(len(w)):
            if not kept[row, j]:
                continue
            q[row, j] = nearest(row, j, w[row, j])
            error = (w[row, j] - q[row, j]) / inverse[0, 0]
            w[row, j + 1 :] -= error * inverse[0, 1:]
    return q


def damped(h: np.ndarray) -> np.ndarray:
    return h + 0.01 * np.diag(h).mean() * np.eye(len(h))


def moments_of(i: int, seed: int = 3) -> Moments:
    """Inputs that are correlated and have a mean, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(i, i, generator=generator) / i**0.5
    x = torch.randn(2000, i, generator=generator) @ mixing
    x += torch.randn(i, generator=generator) * 0.5
    return Moments(x.T @ x / len(x), x.mean(0), len(x))


def output_error(found: torch.Tensor, wanted: torch.Tensor, moments: Moments) -> float:
    """E ||(found - wanted) x||^2."""
    error = (found - wanted).double()
    return float(((error @ moments.second.double()) * error).sum())


# bitdelta


def test_bitdelta_by_hand():
    """D = [[.5, -1, 0], [-.25, 2, -.25]]: mean |D| = 4/6, signs 100 010 -> 0100 0100 first bit high."""
    d = torch.tensor([[0.5, -1.0, 0.0], [-0.25, 2.0, -0.25]])
    codec = delta_codec("bitdelta")
    chosen, parts = codec.encode(DenseMatrix(d), codec.settings_for((2, 3), 1 / 16), KEY)
    assert bits_of(parts["signs"]) == "10001000"
    assert parts["scale"].dtype == torch.float32 and parts["scale"].item() == pytest.approx(4 / 6)
    a = 4 / 6
    expected = torch.tensor([[a, -a, -a], [-a, a, -a]])
    torch.testing.assert_close(decoded(codec, parts, chosen, (2, 3), KEY), expected)


def test_bitdelta_costs_a_bit_a_weight_and_never_more():
    codec = delta_codec("bitdelta")
    for share in (1 / 16, 0.2, 1.0):
        assert codec.value_bytes((64, 48), codec.settings_for((64, 48), share)) == 64 * 48 // 8
    settings = codec.settings_for((64, 48), 1 / 64)
    assert codec.part_bytes((64, 48), settings) == 64 * 48 // 8 // 4 + 4


def test_bitdelta_below_one_bit_keeps_drawn_signs_and_scales_them_up():
    d = delta(40, 30)
    codec = delta_codec("bitdelta")
    chosen, parts = encoded(codec, d, 1 / 64, KEY)
    kept = chosen["kept"]
    assert kept == 40 * 30 // 4
    at = kept_positions(KEY, 0, 1200, int(chosen["threshold"], 16))
    flat, expected = d.reshape(-1).numpy(), np.zeros(1200)
    level = np.abs(flat).mean() * 1200 / kept
    for n in at:
        expected[n] = level if flat[n] > 0 else -level
    found = decoded(codec, parts, chosen, (40, 30), KEY).reshape(-1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for n, bit in zip(at, bits_of(parts["signs"]), strict=False):
        assert bit == ("1" if flat[n] > 0 else "0")


# dare-qt


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dare_qt_rounds_each_kept_entry_to_its_nearest_level(bits: int):
    d = delta(50, 40)
    codec = delta_codec("dare-qt", {"bits": bits})
    chosen, parts = encoded(codec, d, 1 / 8, KEY)
    kept = chosen["kept"]
    assert kept == 50 * 40 * 2 // bits
    unit = 2.0 ** int(chosen["unit"])
    scales = [scale * unit for scale in parts["scales"].tolist()]
    at = kept_positions(KEY, 0, 2000, int(chosen["threshold"], 16))
    stored = levels(bits_of(parts["codes"]), scales, kept, bits)
    middle = (2**bits - 1) / 2
    for n, position in enumerate(at):
        grid = (np.arange(2**bits) - middle) * scales[n // 128]
        value = float(d.reshape(-1)[position])
        assert abs(stored[n] - value) <= np.abs(grid - value).min() * (1 + 1e-5)
    expected = np.zeros(2000)
    expected[at] = stored * 2000 / kept
    found = decoded(codec, parts, chosen, (50, 40), KEY).reshape(-1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dare_qt_with_moments_is_gptq_on_the_kept_entries():
    o, i = 20, 24
    d, moments = delta(o, i), moments_of(24)
    codec = delta_codec("dare-qt", {"bits": 2})
    chosen, parts = codec.encode(
        DenseMatrix(d), codec.settings_for((o, i), 1 / 16), KEY, None, moments
    )
    kept, unit = chosen["kept"], 2.0 ** int(chosen["unit"])
    scales = [scale * unit for scale in parts["scales"].tolist()]
    at = kept_positions(KEY, 0, o * i, int(chosen["threshold"], 16))
    mask, order = np.zeros(o * i, bool), np.zeros(o * i, int)
    mask[at], order[at] = True, np.arange(kept)
    order = order.reshape(o, i)

    def nearest(row: int, column: int, value: float) -> float:
        grid = (np.arange(4) - 1.5) * scales[order[row, column] // 128]
        return grid[np.abs(grid - value).argmin()]

    h = damped(moments.second.double().numpy())
    q = plain_gptq(d.numpy(), h, nearest, mask.reshape(o, i))
    found = decoded(codec, parts, chosen, (o, i), KEY).numpy()
    np.testing.assert_allclose(found, q * (o * i / kept), rtol=1e-5, atol=1e-12)


def test_dare_qt_is_unbiased_over_seeds_but_for_rounding():
    d = delta(32, 32)
    codec = delta_codec("dare-qt", {"bits": 8})
    mean = torch.zeros(32, 32)
    for key in range(600):
        chosen, parts = encoded(codec, d, 0.125, key * 1000)
        mean += decoded(codec, parts, chosen, (32, 32), key * 1000) / 600
    # 1/4 is kept: one draw is off by sqrt(3) times the entry, the mean of 600 by sqrt(3 / 600).
    assert float((mean - d).norm() / d.norm()) < 1.3 * (3 / 600) ** 0.5


# svd-quant and delta-come


def read_bands(parts, shape, cut):
    """(U^T, V^T) as the page of the format says, band by band: V, then U."""
    o, i = shape
    scales = (parts["scales"].double() * 2.0**-10).tolist()
    codes = parts["codes"]
    us, vs = [], []
    for count, width in cut:
        for size, out in ((i, vs), (o, us)):
            n = count * size
            out.append(levels(bits_of(codes), scales, n, width).reshape(count, size))
            codes, scales = codes[-(-n * width // 8) :], scales[-(-n // 128) :]
    assert not len(codes) and not scales
    return np.concatenate(us), np.concatenate(vs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_svd_quant_is_the_truncated_svd_rounded(bits: int):
    d = delta(60, 40)
    codec = delta_codec("svd-quant", {"bits": bits})
    chosen, parts = encoded(codec, d, 1 / 8)
    r = chosen["rank"]
    assert r == 16 * 60 * 40 // (8 * bits * 100)
    u, v = read_bands(parts, (60, 40), [(r, bits)])
    s = parts["s"].double().numpy()
    found = decoded(codec, parts, chosen, (60, 40), 1).numpy()
    np.testing.assert_allclose(found, (u * s[:, None]).T @ v, rtol=1e-4, atol=1e-9)
    exact = torch.linalg.svd(d.double())
    np.testing.assert_allclose(s, exact.S[:r].numpy(), rtol=2**-8)
    wanted = np.concatenate([exact.U[:, :r].T.numpy().ravel(), exact.Vh[:r].numpy().ravel()])
    rounding = np.linalg.norm(np.abs(np.concatenate([u.ravel(), v.ravel()])) - np.abs(wanted))
    # Signal to noise of the best even grids for a Gaussian: 9.25, 14.27, 20.22 dB at 2 to 4 bits.
    noise = {2: 10**-0.4625, 3: 10**-0.7135, 4: 10**-1.011, 8: 0.012}[bits]
    assert rounding / np.linalg.norm(wanted) < 1.15 * noise


def test_svd_quant_with_moments_is_gptq_on_v_then_on_u():
    d, moments = delta(20, 24), moments_of(24)
    codec = delta_codec("svd-quant", {"bits": 3})
    factors = truncated_svd(DenseMatrix(d), 20, KEY)
    chosen = codec.settings_for((20, 24), 1 / 6, factors.s.double().numpy())
    r = chosen["rank"]
    assert r >= 4
    chosen, parts = codec.encode(DenseMatrix(d), chosen, KEY, factors, moments)
    u, v = read_bands(parts, (20, 24), [(r, 3)])
    s = parts["s"].double().numpy()
    scales = (parts["scales"].double() * 2.0**-10).tolist()
    groups_of_v = -(-r * 24 // 128)
    grid = np.arange(8) - 3.5

    def nearest_v(row: int, column: int, value: float) -> float:
        own = grid * scales[(row * 24 + column) // 128]
        return own[np.abs(own - value).argmin()]

    def nearest_u(row: int, column: int, value: float) -> float:
        own = grid * scales[groups_of_v + (column * 20 + row) // 128]
        return own[np.abs(own - value).argmin()]

    h = moments.second.double().numpy()
    every = np.ones((30, 30), bool)
    q_v = plain_gptq(factors.v[:, :r].T.numpy(), damped(h), nearest_v, every)
    np.testing.assert_allclose(v, q_v, rtol=1e-5)
    h_u = s[:, None] * damped(v @ h @ v.T) * s
    goal = (factors.u[:, :r] * factors.s[:r]).double().numpy() / s
    np.testing.assert_allclose(u.T, plain_gptq(goal, h_u, nearest_u, every), rtol=1e-5)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0, (0, 0, 0)),
        (2, (0, 0, 1)),
        (7, (0, 2, 0)),
        (15, (1, 2, 0)),
        (17, (2, 0, 0)),
        (21, (2, 1, 1)),
        (112, (2, 32, 0)),
        (2048, (2, 32, 968)),
    ],
)
def test_delta_come_shares_out_its_bits(bits: int, expected):
    """2048 bits a pair of entries at 1/16 of 4096 x 4096: the paper's 2 / 32 / 968."""
    codec = delta_codec("delta-come")
    chosen = codec.settings_for((4096, 4096), (bits + 0.01) / (16 * 2048))
    assert (chosen["at8"], chosen["at3"], chosen["at2"]) == expected


def test_delta_come_on_the_papers_mlp():
    """4096 x 11008 / 15104 = 2985 bits a pair, less 16 and 96: 1436 at 2 bits (the paper: 1428)."""
    chosen = delta_codec("delta-come").settings_for((4096, 11008), 1 / 16)
    assert chosen == {"at8": 2, "at3": 32, "at2": 1436}


def test_delta_come_codes_what_is_left_band_by_band():
    """U of a band is the residual of the bands before on its vectors, rounded to nearest."""
    d = delta(90, 70, decay=0.4)
    codec = delta_codec("delta-come")
    factors = truncated_svd(DenseMatrix(d), 70, 1)
    chosen = codec.settings_for((90, 70), 0.3, factors.s.double().numpy())
    cut = [(chosen[f"at{width}"], width) for width in (8, 3, 2)]
    assert all(count for count, _ in cut)
    chosen, parts = codec.encode(DenseMatrix(d), chosen, 1, factors)
    u, v = read_bands(parts, (90, 70), cut)
    s = parts["s"].double().numpy()
    residual, first = d.double().numpy(), 0
    for count, width in cut:
        here = slice(first, first + count)
        exact_v = factors.v[:, here].double().numpy()
        goal = residual @ exact_v
        np.testing.assert_allclose(s[here], np.linalg.norm(goal, axis=0), rtol=2**-8)
        unit = goal / s[here]
        # A nearest level is off by half a step at most, but for the few beyond the outermost.
        off = np.abs(u[here].T - unit)
        half = np.abs(u[here]).max() / (2**width - 1)
        assert (off > half * 1.001).mean() < 0.2 and off.mean() < half
        residual = residual - (u[here] * s[here, None]).T @ v[here]
        first += count
    found = decoded(codec, parts, chosen, (90, 70), 1).double().numpy()
    np.testing.assert_allclose(d.double().numpy() - found, residual, rtol=1e-3, atol=1e-8)


# impart-qt


def plan_of(chosen, s: np.ndarray, shape, c: float = 1.0):
    """Kept entries of each column of U and of V, from what is stored."""
    p = (1 - (s / s[0]) ** c) * chosen["gamma"]
    return [[size - int(size * x) for x in p] for size in shape]


def width_of(j: int) -> int:
    return 8 if j < 2 else 3 if j < 34 else 2


def read_impart(parts, chosen, shape):
    """(U^T, V^T) with zeros where dropped, not yet rescaled, the masks and each entry's scale."""
    a = chosen["active"]
    kept = plan_of(chosen, parts["s"].double().numpy(), shape)
    scales = (parts["scales"].double() * 2.0**-10).tolist()
    codes = parts["codes"]
    out = [np.zeros((a, size)) for size in shape]
    steps = [np.zeros((a, size)) for size in shape]
    for first, last in ((0, min(2, a)), (2, min(34, a)), (34, a)):
        for side, stream in ((1, 0x76), (0, 0x75)):
            n = sum(kept[side][first:last])
            if n <= 0:
                continue
            width = width_of(first)
            values = levels(bits_of(codes), scales, n, width)
            own = [scales[k // 128] for k in range(n)]
            codes, scales = codes[-(-n * width // 8) :], scales[-(-n // 128) :]
            used = 0
            for j in range(first, last):
                at = subset(KEY ^ stream, j, shape[side], kept[side][j])
                out[side][j, at] = values[used : used + len(at)]
                steps[side][j, at] = own[used : used + len(at)]
                used += len(at)
    assert not len(codes) and not scales
    return out, steps, kept


def impart_case(o: int, i: int, share: float, moments: Moments | None = None):
    d = delta(o, i, decay=0.4)
    codec = delta_codec("impart-qt", {"beta": 0.0})
    factors = truncated_svd(DenseMatrix(d), min(o, i), KEY)
    chosen = codec.settings_for((o, i), share, factors.s.double().numpy())
    chosen, parts = codec.encode(DenseMatrix(d), chosen, KEY, factors, moments)
    return codec, factors, chosen, parts


def test_impart_qt_is_sparse_vectors_in_three_widths():
    shape = (90, 70)
    codec, factors, chosen, parts = impart_case(*shape, 0.15)
    assert chosen["active"] > 36 and chosen["gamma"] > 0
    (u, v), _, (kept_u, kept_v) = read_impart(parts, chosen, shape)
    s = parts["s"].double().numpy()
    for j in range(chosen["active"]):  # unit vectors, so the worst step of 2 bits is about 1 sigma
        for found, exact, size in ((u, factors.u, 90), (v, factors.v, 70)):
            at = found[j] != 0
            off = np.abs(found[j] - exact[:, j].double().numpy())[at]
            assert np.sqrt((off**2).mean() * size) < {8: 0.03, 3: 0.35, 2: 0.75}[width_of(j)]
    left = u * (90 / np.array(kept_u) * s)[:, None]
    right = v * (70 / np.array(kept_v))[:, None]
    found = decoded(codec, parts, chosen, shape, KEY).numpy()
    np.testing.assert_allclose(found, left.T @ right, rtol=1e-3, atol=1e-8)


def test_impart_qt_alpha_is_the_smallest_that_fits():
    """The bits of all kept entries meet the share, and follow Algorithm 1 with gamma."""
    shape, share = (600, 400), 1 / 16
    s = np.arange(1, 401) ** -0.5
    codec = delta_codec("impart-qt")
    chosen = codec.settings_for(shape, share, s)
    a, budget = chosen["active"], 16 * 600 * 400 * share
    stored = torch.tensor(s).bfloat16().double().numpy()[:a]
    kept = plan_of(chosen, stored, shape)
    bits = sum(width_of(j) * (kept[0][j] + kept[1][j]) for j in range(a))
    assert bits <= 8 * chosen["code_bytes"] <= min(budget, bits + 6 * 7)
    assert budget - bits < 3 * 2 * (600 + 400), "what is left would not pay for three components"
    alpha = chosen["gamma"] * (1 - 0.6) + 0.6
    k = int(400 * (1 - 0.6))
    p = (1 - s[:k] / s[0]) * chosen["gamma"]
    active = k
    while p.mean() < (alpha - 0.6) / 0.4 * (1 - 1e-6):
        active -= 1
        p[active] = 1.0
    assert abs(active - a) <= 1


def test_impart_qt_with_moments_is_masked_gptq_over_v_then_over_all_of_u():
    """A band of U is rounded with the later ones in view; these then make up for its errors."""
    shape = (44, 48)
    o, i = shape
    moments = moments_of(i)
    _, factors, chosen, parts = impart_case(o, i, 0.25, moments)
    a = chosen["active"]
    assert a > 35, "all three widths"
    (u, v), (steps_u, steps_v), (kept_u, kept_v) = read_impart(parts, chosen, shape)
    s = parts["s"].double().numpy()

    def nearest(step: float, j: int, value: float) -> float:
        width = width_of(j)
        own = (np.arange(2**width) - (2**width - 1) / 2) * step
        return own[np.abs(own - value).argmin()]

    h = moments.second.double().numpy()
    exact_v = factors.v[:, :a].T.numpy()
    q_v = plain_gptq(exact_v, damped(h), lambda j, b, x: nearest(steps_v[j, b], j, x), steps_v > 0)
    np.testing.assert_allclose(v, q_v, rtol=1e-5, atol=1e-12)
    right = v * (i / np.array(kept_v))[:, None]
    gains = s * o / np.array(kept_u)
    h_u = gains[:, None] * damped(right @ h @ right.T) * gains
    goal = (factors.u[:, :a] * factors.s[:a]).double().numpy() / s
    kept = steps_u.T > 0
    for first, last in ((0, 2), (2, 34), (34, a)):
        q = plain_gptq(
            goal[:, first:],
            h_u[first:, first:],
            lambda b, j, x, first=first: nearest(steps_u[first + j, b], first + j, x),
            kept[:, first:],
        )[:, : last - first]
        np.testing.assert_allclose(u[first:last].T, q, rtol=1e-5, atol=1e-12)
        error = (q - goal[:, first:last]) * kept[:, first:last]
        goal[:, last:] -= error @ h_u[first:last, last:] @ np.linalg.inv(h_u[last:, last:])


def test_bands_of_u_are_coded_as_one_pass_of_gptq_would():
    """Without masks it is the textbook loop over all components, whatever their widths."""
    o, a = 40, 37
    generator = torch.Generator().manual_seed(2)
    u = torch.linalg.qr(torch.randn(o, a, generator=generator)).Q
    gains = torch.arange(1, a + 1).double().pow(-0.7)
    x = torch.randn(500, a, generator=generator) @ torch.randn(a, a, generator=generator)
    h = torch.from_numpy(damped((x.T @ x).double().numpy())) * gains * gains[:, None]
    runs = code_across(u.T, bands([(2, 8), (32, 3), (3, 2)]), torch.float16, h)
    found = torch.cat([run.vectors for run in runs]).T.double().numpy()
    steps = np.zeros((o, a))
    for first, run in zip((0, 2, 34), runs, strict=True):
        for n in range(run.vectors.numel()):
            steps[n % o, first + n // o] = float(run.scales[n // 128]) * 2.0**-10

    def nearest(row: int, j: int, value: float) -> float:
        width = width_of(j)
        own = (np.arange(2**width) - (2**width - 1) / 2) * steps[row, j]
        return own[np.abs(own - value).argmin()]

    expected = plain_gptq(u.numpy(), h.numpy(), nearest, np.ones((o, a), bool))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_impart_qt_large_share_keeps_components_whole():
    _, _, chosen, parts = impart_case(64, 48, 0.6)
    assert chosen["gamma"] == 0.0 and chosen["active"] == 48
    kept = plan_of(chosen, parts["s"].double().numpy(), (64, 48))
    assert kept == [[64] * 48, [48] * 48]


def test_impart_qt_refuses_singular_values_that_cannot_be():
    codec, _, chosen, parts = impart_case(90, 70, 0.1)
    for at, value in ((0, 0.0), (0, float("nan")), (3, float("inf")), (5, -1.0)):
        s = parts["s"].clone()
        s[at] = value
        with pytest.raises(ValueError):
            decoded(codec, {**parts, "s": s}, chosen, (90, 70), KEY)


@pytest.mark.parametrize("exponent", [0.01, 0.5, 1.0, 1.7, 2.0, 9.99])
def test_power_is_the_power(exponent: float):
    x = np.linspace(0.001, 1, 50)
    np.testing.assert_allclose(power(x, exponent), x**exponent, rtol=1e-4)
    assert np.array_equal(power(x, 1.0), x)
    assert np.array_equal(power(x, 0.5), np.sqrt(x))


# All of them


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("share", [1 / 32, 1 / 8])
def test_values_cost_their_share(name: str, share: float):
    """`share` is bits of values / (16 o i), up to a component or the rounding to bytes."""
    shape = (320, 256)
    codec = delta_codec(name)
    spectrum = np.arange(1, 257) ** -0.5 if codec.uses_factors else None
    wanted = 2 * 320 * 256 * min(share, 1 / 16 if name == "bitdelta" else 1)
    used = codec.value_bytes(shape, codec.settings_for(shape, share, spectrum))
    assert wanted - (320 + 256) < used <= wanted + 6


@pytest.mark.parametrize("name", ["dare-qt", "svd-quant", "delta-come", "impart-qt"])
@pytest.mark.parametrize("share", [1 / 16, 1 / 8])
def test_gptq_lowers_the_error_of_the_outputs(name: str, share: float):
    """Against rounding to nearest, of the same entries. The goal is what is kept, not rounded."""
    shape = (120, 100)
    d, moments = delta(*shape, decay=0.6), moments_of(100)
    codec = delta_codec(name, {"bits": 2} if name == "dare-qt" else {})
    factors = truncated_svd(DenseMatrix(d), 100, KEY) if codec.uses_factors else None
    spectrum = factors.s.double().numpy() if factors else None
    chosen = codec.settings_for(shape, share, spectrum)
    errors = []
    for known in (None, moments):
        chosen, parts = codec.encode(DenseMatrix(d), chosen, KEY, factors, known)
        found = decoded(codec, parts, chosen, shape, KEY)
        if name == "dare-qt":
            goal = d * (found != 0) * (d.numel() / chosen["kept"])
        else:
            u, v = kept_vectors(name, chosen, parts, factors, shape)
            goal = (u * factors.s[: len(u), None]).T @ v
        errors.append(output_error(found, goal, moments))
    assert errors[1] < 0.95 * errors[0]


def kept_vectors(name: str, chosen, parts, factors: Factors, shape):
    """(U^T, V^T) as they are before rounding: whole, or with drawn entries times size / kept."""
    a = len(parts["s"])
    u, v = factors.u[:, :a].T.clone(), factors.v[:, :a].T.clone()
    if name == "impart-qt":
        kept = plan_of(chosen, parts["s"].double().numpy(), shape)
        for side, (vectors, stream) in enumerate(((u, 0x75), (v, 0x76))):
            for j in range(a):
                gain = torch.zeros(shape[side])
                at = subset(KEY ^ stream, j, shape[side], kept[side][j])
                gain[torch.from_numpy(at)] = shape[side] / kept[side][j]
                vectors[j] *= gain
    return u, v


@pytest.mark.parametrize("name", QUANTISED)
def test_diagonal_moments_change_nothing_and_zero_moments_do_no_harm(name: str):
    shape = (48, 40)
    d, moments = delta(*shape), moments_of(40)
    codec = delta_codec(name)
    factors = truncated_svd(DenseMatrix(d), 40, KEY) if codec.uses_factors else None
    spectrum = factors.s.double().numpy() if factors else None
    chosen = codec.settings_for(shape, 0.1, spectrum)
    diagonal = Moments(moments.diagonal.clone(), moments.mean, moments.tokens)
    zero = Moments(torch.zeros(40, 40), torch.zeros(40), 1)
    known = [codec.encode(DenseMatrix(d), chosen, KEY, factors, m) for m in (None, diagonal, zero)]
    for part, value in known[0][1].items():
        assert torch.equal(value, known[1][1][part])
    assert torch.isfinite(decoded(codec, known[2][1], known[2][0], shape, KEY)).all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e3])
def test_deltas_of_any_size(name: str, size: float):
    """Scales neither underflow nor overflow: the relative error does not depend on the size."""
    shape = (60, 50)
    codec = delta_codec(name)
    errors = []
    for d in (delta(*shape), delta(*shape) * size / 1e-4):
        chosen, parts = encoded(codec, d, 0.1, KEY)
        errors.append(float((decoded(codec, parts, chosen, shape, KEY) - d).norm() / d.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("name", ["svd-quant", "delta-come", "impart-qt"])
def test_a_delta_of_lower_rank_than_planned(name: str):
    """Encoding finds fewer components than the settings speak of: it stores those, within size."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(80, 3, generator=generator) @ torch.randn(3, 60, generator=generator) * 1e-3
    codec = delta_codec(name)
    planned = codec.settings_for((80, 60), 0.3)
    for factors in (None, Factors(torch.zeros(80, 0), torch.zeros(0), torch.zeros(60, 0))):
        chosen, parts = codec.encode(DenseMatrix(d), planned, KEY, factors)
        assert len(parts["s"]) == 3
        assert codec.part_bytes((80, 60), chosen) <= codec.part_bytes((80, 60), planned)
        error = (decoded(codec, parts, chosen, (80, 60), KEY) - d).norm() / d.norm()
        assert float(error) < 0.25


@pytest.mark.parametrize(
    ("name", "bits"), [("dare-qt", 3), ("svd-quant", 9), ("svd-quant", 1), ("svd-quant", 2.5)]
)
def test_bits_out_of_bounds_are_refused(name: str, bits: float):
    with pytest.raises(UsageError, match=f"bits must be .*, not {bits}"):
        delta_codec(name, {"bits": bits})
