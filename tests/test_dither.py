"""Levels at seeded thresholds: right on average, the same for ever, damage noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.codecs import delta_codec
from deltafold.coding import dither
from deltafold.coding.entropy import TABLE_BITS
from deltafold.linalg.matrices import DenseMatrix, Moments

few = settings(deadline=None, max_examples=40)
KEY = 0xA6A7854E2D6C487D


def encoded(delta: torch.Tensor, step: float, key: int = KEY) -> tuple[Any, Any]:
    return delta_codec("auto").encode(DenseMatrix(delta), {"step": step}, key)


def decoded(parts: Any, chosen: Any, shape: tuple[int, int], key: int = KEY) -> torch.Tensor:
    rows = delta_codec("auto").decode(parts, chosen, shape, key)
    return torch.cat([block for _, block in rows])


def test_thresholds_are_pinned() -> None:
    """For ever: archives rest on them. Four from each 64-bit integer, from any place on."""
    expected = [32830, 64243, 224, 44926, 29359, 28064, 59036, 56753]
    assert dither.thresholds(KEY, 0, 8).tolist() == expected
    for start in range(8):
        assert dither.thresholds(KEY, start, 8).tolist() == expected[start:]


def test_thresholds_are_spread_evenly() -> None:
    found = dither.thresholds(3, 0, 1 << 20)
    counts = np.bincount(found >> 10, minlength=64)
    assert abs(counts - (1 << 14)).max() < 6 * (1 << 7)  # six standard deviations of a bin


@few
@given(st.floats(-7.5, 7.5).filter(lambda value: abs(value) > 1e-3), st.floats(0.1, 3.0))
def test_the_level_is_right_on_average(value: float, unit: float) -> None:
    """Over many thresholds the mean level is the value, and each is one of its two neighbours."""
    delta = torch.full((128, 128), value * unit)
    chosen, parts = encoded(delta, 1 / abs(value))  # steps count in root mean squares
    levels = decoded(parts, chosen, (128, 128)) / unit
    assert float(levels.double().mean()) == pytest.approx(value, abs=5 * 0.5 / 128 + 1e-4)
    assert float((levels - value).abs().max()) < 1 + 1e-4


def test_errors_are_right_on_average_in_a_matrix() -> None:
    """Over seeds: the decoded matrix, summed, nears the delta, small entries too."""
    delta = 0.01 * torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros_like(delta)
    for key in range(200):
        chosen, parts = encoded(delta, 2.0, key)
        total += decoded(parts, chosen, (48, 64), key)
    wrong = float((total / 200 - delta).norm() / delta.norm())
    chosen, parts = encoded(delta, 2.0, 0)
    once = float((decoded(parts, chosen, (48, 64), 0) - delta).norm() / delta.norm())
    assert wrong == pytest.approx(once / 200**0.5, rel=0.1)


@few
@given(st.lists(st.lists(st.integers(0, 10**6), min_size=4, max_size=4), min_size=1, max_size=5))
def test_odds_give_tables_that_hold_every_level(rows: list[list[int]]) -> None:
    histogram = np.array(rows, dtype=np.int64)
    odds = dither.odds_of(histogram)
    assert odds.dtype == np.uint8 and odds.shape == (len(rows), 3)
    for seen, table in zip(histogram, dither.tables_of(odds), strict=True):
        counts = table.counts.tolist()
        assert counts == counts[::-1] and sum(counts) == 1 << TABLE_BITS
        assert counts[3] > 0
        assert [count > 0 for count in counts[4:]] == [bool(n) for n in seen[1:]]


def test_odds_are_near_the_histogram() -> None:
    """Codes are 3.6 % apart, so counts come within 1.9 % where they are large."""
    histogram = np.array([[900_000, 80_000, 15_000, 5_000]])
    (table,) = dither.tables_of(dither.odds_of(histogram))
    wanted = histogram[0, 1:] / (2 * histogram.sum()) * (1 << TABLE_BITS)
    found = table.counts[4:]
    assert np.abs(found - wanted).max() <= 0.019 * wanted.max() + 1
    bits = -np.log2(table.counts[3:] / (1 << TABLE_BITS))
    assert float(histogram[0] @ bits) < 1.001 * dither.cost_bits(histogram)


def test_counts_of_codes() -> None:
    """0, then 1, 1.036, 1.074 ... rounded down, to 2^13, which would leave nothing to level 0."""
    tables = dither.tables_of(np.arange(255, dtype=np.uint8)[:, None])
    counts = [int(table.counts[2]) for table in tables]
    assert counts[:2] == [0, 1] and counts[254] == int(2 ** (13 * 253 / 254))
    assert counts == sorted(counts)
    with pytest.raises(ValueError, match="leaves nothing"):
        dither.tables_of(np.array([[255]], dtype=np.uint8))


def test_cost_by_hand() -> None:
    """Eight of sixteen are 1 or -1: a bit each for whether, a bit each of those for the sign."""
    assert dither.cost_bits(np.array([[8, 8], [5, 0], [0, 0]])) == 16 + 8


def uneven() -> torch.Tensor:
    """Rows over three decades, one of them zero."""
    delta = torch.randn(40, 33, generator=torch.Generator().manual_seed(1))
    delta *= 10 ** torch.linspace(-3, 0, 40)[:, None]
    delta[7] = 0
    return delta


def test_larger_rows_are_finer_and_zero_rows_stay_zero() -> None:
    delta = uneven()
    chosen, parts = encoded(delta, 0.5)
    found = decoded(parts, chosen, (40, 33))
    assert not found[7].any()
    errors = (found - delta).norm(dim=1) / delta.norm(dim=1)
    assert float(errors[30:].mean()) < 0.5 * float(errors[8:18].mean())


def test_moments_lower_the_error_that_the_layer_sees() -> None:
    generator = torch.Generator().manual_seed(2)
    delta = 0.01 * torch.randn(64, 48, generator=generator)
    inputs = torch.randn(400, 6, generator=generator) @ torch.randn(6, 48, generator=generator)
    second = (inputs.T @ inputs / 400).double()
    moments = Moments(second=second, mean=inputs.mean(0).double(), tokens=400)
    codec = delta_codec("auto")
    errors = []
    for known in (None, moments):
        chosen, parts = codec.encode(DenseMatrix(delta), {"step": 1.0}, KEY, None, known)
        wrong = decoded(parts, chosen, (64, 48)) - delta
        errors.append(float((inputs @ wrong.T).norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("delta", [uneven(), 0.01 * uneven()[30:]], ids=["groups", "one group"])
def test_damaged_code_is_refused_or_decoded_never_a_crash(delta: torch.Tensor) -> None:
    """Any byte changed, any length: ValueError, or other numbers of the right shape."""
    shape = tuple(delta.shape)
    chosen, parts = encoded(delta, 1.0)
    code = parts["code"].numpy()
    rng = np.random.default_rng(0)
    refused = 0
    places = {*range(80), *rng.integers(0, len(code), 250).tolist()}
    for place in sorted(places & set(range(len(code)))):
        for flip in (0xFF, 1 << int(rng.integers(8))):
            damaged = code.copy()
            damaged[place] ^= flip
            refused += not survives(damaged, chosen, shape)
    for length in range(1, len(code), 7):
        assert not survives(code[:length], chosen, shape), length
    assert not survives(np.append(code, np.uint8(0)), chosen, shape)
    assert refused > 50
    assert survives(code, chosen, shape)


def survives(code: Any, chosen: Any, shape: tuple[int, int]) -> bool:
    """Whether damaged code decodes; anything but ValueError is a failure."""
    part = torch.from_numpy(code.copy())
    try:
        found = decoded({"code": part}, chosen | {"n_bytes": len(code)}, shape)
    except ValueError:
        return False
    assert found.shape == shape
    return True
