"""The codec `context`: every bit of any dtype, near the length that its model promises, damage told."""

from __future__ import annotations

import hashlib

import format_reader
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.codecs import exact_codec
from deltafold.coding.contexts import Order, exponents
from deltafold.coding.frequencies import from_row, geometric_row, to_row
from deltafold.coding.planes import bit_pattern
from deltafold.coding.tokens import first_value, open_bits, to_tokens, token_count
from deltafold.dtypes import DTYPE_NAMES

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip
few = settings(deadline=None, max_examples=80)


def code_of(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    found, parts = exact_codec("context").encode(base, tuned)
    assert found == {} and list(parts) == ["code"]
    return parts["code"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape and a.dtype == b.dtype and bool((bit_pattern(a) == bit_pattern(b)).all())
    )


def bits_of(dtype: torch.dtype, raw: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.from_numpy(raw.view(np.uint8) & 1).bool()[: int(np.prod(shape))].reshape(shape)
    n = int(np.prod(shape)) * dtype.itemsize
    if not n:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(raw.view(np.uint8)[:n].copy()).view(dtype).reshape(shape)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bits, NaN payloads and zeros of both signs among them; a share of them changed, a little or at will."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.sampled_from([(0,), (1,), (37,), (1, 40), (40, 1), (13, 21), (3, 5, 8), (90, 200)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = int(np.prod(shape))
    old = rng.integers(0, 256, 8 * n + 8, dtype=np.uint8)
    base = bits_of(dtype, old, shape)
    share, far = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])), draw(st.booleans())
    near = (bit_pattern(base) ^ rng.integers(0, 2, n).astype(bit_pattern(base).dtype)) & 1
    other = bits_of(dtype, rng.integers(0, 256, 8 * n + 8, dtype=np.uint8), shape)
    if not n:
        return base, base
    new = bit_pattern(base).copy()
    at = rng.random(n) < share
    new[at] = bit_pattern(other)[at] if far else (bit_pattern(base) & ~new.dtype.type(1) | near)[at]
    if dtype == torch.bool:
        return base, torch.from_numpy(new & 1).bool().reshape(shape)
    return base, torch.from_numpy(new).view(dtype).reshape(shape)


@few
@given(pairs())
def test_every_bit_comes_back(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, tuned = pair
    code = code_of(base, tuned)
    assert same_bits(exact_codec("context").decode({"code": code}, {}, base), tuned)
    assert torch.equal(code_of(base, tuned), code)


@settings(deadline=None, max_examples=25)
@given(pairs())
def test_a_reader_written_from_the_page_gives_the_same_bits(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    base, tuned = pair
    if base.numel() > 1000 or not base.numel():
        return
    name = DTYPE_NAMES[base.dtype]
    matrix = bit_pattern(base).reshape(-1, base.shape[-1] if base.dim() > 1 else base.numel())
    stored = format_reader.Stored("U8", (0,), code_of(base, tuned).numpy().tobytes())
    found = format_reader.context({"code": stored}, {}, matrix, name)
    assert (found.reshape(-1) == bit_pattern(tuned)).all()


def stepped(shape: tuple[int, int], step: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 base and what an optimiser's step of this size makes of it, its masters well mixed."""
    generator = torch.Generator().manual_seed(seed)
    masters = torch.randn(shape, generator=generator) * 0.04
    sign = torch.randn(shape, generator=generator).sign()
    return masters.bfloat16(), (masters + sign * step).bfloat16()


def ideal_bytes(base: torch.Tensor, tuned: torch.Tensor) -> float:
    """n H(changed) and their moves, each exponent by itself, nothing else paid."""
    old, new = bit_pattern(base), bit_pattern(tuned)
    exponent, moves = exponents(old, base.dtype), new.astype(np.int64) - old.astype(np.int64)
    bits = 0.0
    for each in np.unique(exponent):
        _, counts = np.unique(moves[exponent == each], return_counts=True)
        bits += float((counts * np.log2(counts.sum() / counts)).sum())
    return bits / 8


@pytest.mark.parametrize("step", [2e-7, 1e-6, 3e-6])
def test_sparse_patches_come_near_the_length_that_the_exponents_allow(step: float) -> None:
    base, tuned = stepped((1024, 1024), step, 1)
    ideal = ideal_bytes(base, tuned)
    assert 0.95 * ideal < code_of(base, tuned).numel() < 1.05 * ideal


def test_rows_and_columns_that_change_more_are_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(512, 512, generator=generator) * 0.02).bfloat16()
    usual = 10 ** torch.linspace(-1, 1, 512)
    delta = torch.randn(512, 512, generator=generator) * 2e-4 * usual[:, None] * usual.flip(0)
    tuned = (base.float() + delta).bfloat16()
    assert code_of(base, tuned).numel() < 0.92 * ideal_bytes(base, tuned)


def test_smaller_than_the_other_exact_codecs_by_a_quarter() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(512, 512, generator=generator) * 0.02).bfloat16()
    dense = (base.float() + torch.randn(512, 512, generator=generator) * 2e-4).bfloat16()
    for tuned, times in ((dense, 0.83), (stepped((512, 512), 3e-6, 0)[1], 0.75)):
        start = base if tuned is dense else stepped((512, 512), 3e-6, 0)[0]
        for other in ("lossless", "sparse-patch"):
            _, parts = exact_codec(other).encode(start, tuned)
            assert code_of(start, tuned).numel() < times * sum(p.numel() for p in parts.values())


def test_nothing_changed_costs_nothing() -> None:
    base = torch.randn(300, 300).bfloat16()
    assert code_of(base, base).numel() < 24


def test_bytes_are_pinned() -> None:
    """What is stored may not change with a library."""
    base, tuned = stepped((64, 96), 3e-6, 3)
    code = code_of(base, tuned).numpy().tobytes()
    assert (len(code), hashlib.sha256(code).hexdigest()[:16]) == PINNED


PINNED = (280, "27157b6e48af0c95")


def test_damage_is_told_or_decodes_to_something() -> None:
    """A part has a checksum; whatever passes it must not bring the reader down."""
    base, tuned = stepped((64, 96), 3e-6, 3)
    code = code_of(base, tuned)
    codec = exact_codec("context")
    told = 0
    for at in range(0, code.numel(), 3):
        for wrong in (code.clone(), code[:at], torch.cat([code[:at], code])):
            if wrong.numel() == code.numel():
                wrong[at] ^= 1 << (at % 8)
            try:
                found = codec.decode({"code": wrong}, {}, base)
            except ValueError:
                told += 1
            else:
                assert found.shape == base.shape and found.dtype == base.dtype
    assert told > code.numel() // 3
    with pytest.raises(ValueError):
        codec.decode({"code": code}, {}, torch.zeros(5, 5).bfloat16())


@few
@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.sampled_from([2, 3]))
def test_tokens_name_the_part_that_an_integer_lies_in(values: list[int], fine: int) -> None:
    if fine == 3:
        values = [value >> 32 for value in values]
    for value, token in zip(
        values, to_tokens(np.array(values, dtype=np.uint64), fine), strict=True
    ):
        first, width = first_value(int(token), fine), open_bits(int(token), fine)
        assert first <= value < first + (1 << width)
        assert token_count(value, fine) == int(token) + 1


@few
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=256))
def test_stored_frequencies_are_near_the_histogram(counts: list[int]) -> None:
    histogram = np.array(counts)
    row = to_row(histogram)
    if not histogram.any():
        assert not len(row)
        return
    frequencies = from_row(row)
    assert frequencies.sum() == 1 << 24
    assert ((frequencies > 0) == (histogram[: len(row)] > 0)).all()
    seen = histogram[histogram > 0]
    ideal = (seen * np.log2(seen.sum() / seen)).sum()
    paid = (seen * (24 - np.log2(frequencies[frequencies > 0]))).sum()
    assert paid <= ideal + 0.003 * seen.sum()


def test_gaps_are_geometric() -> None:
    """Marks on a quarter of the values: gap 0 in a quarter of cases, gap 1 in 3/16, by hand."""
    found = geometric_row(250, 1000, 3) / 2**24
    assert found[:3] == pytest.approx([1 / 4, 3 / 16, 9 / 64], abs=1e-5)
    assert found[16] == pytest.approx(0.75**16 - 0.75**18, abs=1e-5)
    assert len(geometric_row(3, 3, 3)) == 1


@few
@given(st.integers(1, 5), st.integers(0, 50000), st.integers(0, 9))
def test_order_sorts_by_group_and_undoes_it(count: int, n: int, seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, count, n).astype(np.uint8)
    order, values = Order(groups, count), np.arange(n, dtype=np.uint32)
    spread = order.gathered(values)
    assert (order.scattered(spread) == values).all()
    for group in range(count):
        members = np.flatnonzero(groups == group)
        assert (order.run(group, spread) == members).all()
        ranks = np.arange(0, len(members), 3)
        assert (order.places(order.marked(group, ranks)) == members[ranks]).all()
    assert order.sizes.tolist() == np.bincount(groups, minlength=count).tolist()
