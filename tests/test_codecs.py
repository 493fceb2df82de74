"""Tests that run over every codec, found by name: a new file in `codecs/` is tested by being there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.codecs import delta_codec, exact_codec, get, names
from deltafold.codecs.base import DeltaCodec
from deltafold.errors import UsageError
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix

few = settings(deadline=None, max_examples=25)
LOSSY = [name for name in names() if get(name).lossy]
EXACT = [name for name in names() if not get(name).lossy]


def delta(o: int, i: int, seed: int = 0, decay: float = 0.8) -> torch.Tensor:
    """A delta with a falling spectrum and some noise, of the size that fine-tuning leaves."""
    generator = torch.Generator().manual_seed(seed)
    r = min(o, i)
    u = torch.randn(o, r, generator=generator) / o**0.5
    v = torch.randn(i, r, generator=generator) / i**0.5
    s = torch.arange(1, r + 1).float().pow(-decay)
    return ((u * s) @ v.T + torch.randn(o, i, generator=generator) * 1e-3) * 1e-2


def decoded(codec: DeltaCodec, parts, chosen, shape, key) -> torch.Tensor:
    out = torch.full(shape, float("nan"))
    for start, rows in codec.decode(parts, chosen, shape, key):
        out[start : start + len(rows)] = rows
    return out


def encoded(codec: DeltaCodec, d: torch.Tensor, share: float, key: int = 1):
    """(settings, parts) at a share, with all factors where the codec wants them."""
    shape = tuple(d.shape)
    factors = spectrum = None
    if codec.uses_factors:
        factors = truncated_svd(DenseMatrix(d), min(shape), key)
        spectrum = factors.s.double().numpy()
    chosen = codec.settings_for(shape, share, spectrum)
    return codec.encode(DenseMatrix(d), chosen, key, factors)


SHAPES = [(48, 80), (80, 48), (64, 64), (17, 200)]


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value_dtype", ["fp16", "bf16"])
def test_parts_are_what_the_layout_promises(name: str, shape, value_dtype: str):
    codec = delta_codec(name, {"value_dtype": value_dtype})
    chosen, parts = encoded(codec, delta(*shape), 0.15)
    layout = codec.layout(shape, chosen)
    assert set(parts) == set(layout)
    for part, spec in layout.items():
        assert parts[part].dtype == spec.dtype and tuple(parts[part].shape) == spec.shape
    stored = sum(p.numel() * p.element_size() for p in parts.values())
    assert codec.part_bytes(shape, chosen) == stored
    assert codec.value_bytes(shape, chosen) <= stored


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_covers_every_row_and_is_finite(name: str, shape):
    codec = delta_codec(name)
    chosen, parts = encoded(codec, delta(*shape), 0.15)
    assert bool(torch.isfinite(decoded(codec, parts, chosen, shape, 1)).all())


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_kept_decodes_to_zero(name: str):
    codec = delta_codec(name)
    chosen, parts = encoded(codec, delta(40, 30), 0.0)
    assert not decoded(codec, parts, chosen, (40, 30), 1).any()


@pytest.mark.parametrize("name", LOSSY)
def test_all_zero_delta(name: str):
    codec = delta_codec(name)
    chosen, parts = encoded(codec, torch.zeros(40, 30), 0.2)
    assert not decoded(codec, parts, chosen, (40, 30), 1).any()


# ||D - D^|| / ||D|| with everything kept. A k-bit grid leaves 0.1 (4 bits) to 0.35 (2 bits) of what
# is Gaussian, once for entries, twice for factors; signs leave sqrt(1 - 2 / pi) = 0.603 of it.
# `auto` has a smallest step of a tenth of the root mean square: 0.1 / sqrt(6) = 0.041 in a usual row,
# more in one that is smaller than others.
ROUNDING = {
    "auto": 0.055,
    "bitdelta": 0.65,
    "dare-qt": 0.13,
    "delta-come": 0.17,
    "impart-qt": 0.17,
    "svd-quant": 0.15,
}


@pytest.mark.parametrize("name", LOSSY)
def test_everything_kept_is_the_delta(name: str):
    """At share 1 (twice that for factors) only rounding is lost: to 16 bits, or to few."""
    d = delta(40, 40)
    codec = delta_codec(name)
    share = 1.0 if not codec.uses_factors else 2.0
    chosen, parts = encoded(codec, d, share)
    error = (decoded(codec, parts, chosen, (40, 40), 1) - d).norm() / d.norm()
    assert float(error) < ROUNDING.get(name, 2e-3)


@few
@given(
    st.sampled_from(LOSSY),
    st.integers(16, 70),
    st.integers(16, 70),
    st.floats(0.01, 0.6),
    st.integers(0, 5),
)
def test_fit_never_exceeds_its_bytes(name: str, o: int, i: int, share: float, seed: int):
    codec = delta_codec(name)
    d = delta(o, i, seed)
    spectrum = torch.linalg.svdvals(d.double()).numpy() if codec.uses_factors else None
    target = share * o * i * 2
    for nominal in (False, True):
        chosen, used = codec.fit((o, i), target, spectrum, nominal)
        measure = codec.value_bytes if nominal else codec.part_bytes
        assert used == measure((o, i), chosen)
        smallest = measure((o, i), codec.settings_for((o, i), 0.0, spectrum))
        assert used <= max(target, smallest)


@pytest.mark.parametrize("name", LOSSY)
def test_fit_uses_what_it_is_given(name: str):
    """On a large enough matrix the budget is used up to a component."""
    codec = delta_codec(name)
    shape = (256, 192)
    spectrum = np.arange(1, 193) ** -0.5 if codec.uses_factors else None
    most = codec.part_bytes(shape, codec.settings_for(shape, 1.0, spectrum))  # one bit a sign
    target = min(0.1 * 256 * 192 * 2, most)
    _, used = codec.fit(shape, target, spectrum, nominal=False)
    assert target - used <= 2 * (256 + 192) + 8


@pytest.mark.parametrize("name", LOSSY)
def test_same_key_same_bytes_other_key_other_positions(name: str):
    codec = delta_codec(name)
    d = delta(64, 64)
    _, first = encoded(codec, d, 0.05, key=5)
    _, second = encoded(codec, d, 0.05, key=5)
    assert all(torch.equal(first[part], second[part]) for part in first)
    if codec.seeded:
        _, other = encoded(codec, d, 0.05, key=6)
        assert any(not torch.equal(first[part], other[part]) for part in first)


@pytest.mark.parametrize("name", LOSSY)
def test_parts_of_another_matrix_are_refused(name: str):
    codec = delta_codec(name)
    chosen, parts = encoded(codec, delta(64, 64), 0.1)
    largest = max(parts, key=lambda part: parts[part].numel())
    with pytest.raises(ValueError):
        decoded(codec, {**parts, largest: parts[largest].reshape(-1)[:-1]}, chosen, (64, 64), 1)
    with pytest.raises(ValueError):
        decoded(codec, {k: v for k, v in parts.items() if k != largest}, chosen, (64, 64), 1)


def pairs(dtype: torch.dtype, o: int, i: int, share: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(o, i, generator=generator).to(dtype)
    changed = torch.rand(o, i, generator=generator) < share
    tuned = torch.where(changed, (base.float() * 1.01 + 1e-3).to(dtype), base)
    return base, tuned


@few
@given(
    st.sampled_from([name for name in EXACT if name != "skip"]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.integers(0, 3),
)
def test_exact_codecs_give_every_bit_back(name, dtype, o, i, share, seed):
    base, tuned = pairs(dtype, o, i, share, seed)
    codec = exact_codec(name)
    chosen, parts = codec.encode(base, tuned)
    assert all(part.dtype == torch.uint8 and part.dim() == 1 for part in parts.values())
    assert torch.equal(codec.decode(parts, chosen, base), tuned)


def test_few_changes_cost_little():
    base, tuned = pairs(torch.bfloat16, 200, 200, 0.01, 0)
    sizes = {}
    for name in ("lossless", "sparse-patch"):
        _, parts = exact_codec(name).encode(base, tuned)
        sizes[name] = sum(part.numel() for part in parts.values())
    assert sizes["sparse-patch"] < sizes["lossless"] < 0.1 * base.numel() * 2


def test_rows_store_only_changed_rows():
    base = torch.randn(500, 32).bfloat16()
    tuned = base.clone()
    tuned[[3, 400]] += 1
    _, parts = exact_codec("rows").encode(base, tuned)
    assert sum(part.numel() for part in parts.values()) < 2 * 32 * 2 + 80


def test_lossless_is_smaller_than_zstd_19_of_the_tensor():
    import zstandard

    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(512, 512, generator=generator) * 0.02).bfloat16()
    tuned = (base.float() + torch.randn(512, 512, generator=generator) * 2e-4).bfloat16()
    _, parts = exact_codec("lossless").encode(base, tuned)
    ours = sum(part.numel() for part in parts.values())
    plain = len(
        zstandard.ZstdCompressor(level=19).compress(tuned.view(torch.uint8).numpy().tobytes())
    )
    assert ours < 0.75 * plain


def test_unknown_names_and_settings_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"'imprt'.*'impart'"):
        get("imprt")
    with pytest.raises(UsageError, match=r"'betta'.*'beta'"):
        delta_codec("impart", {"betta": 0.5})
    with pytest.raises(UsageError, match="beta must lie between"):
        delta_codec("impart", {"beta": 1.5})
    with pytest.raises(UsageError, match="value_dtype must be"):
        delta_codec("dare", {"value_dtype": "fp8"})


def test_every_codec_says_what_it_is():
    for name in names():
        codec = get(name)
        assert codec.name == name and codec.title and codec.paper and codec.version >= 1
        assert (
            codec.__module__
            and len(__import__(codec.__module__, fromlist=["x"]).__doc__ or "") > 80
        )
