"""Who gets how many bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.codecs import delta_codec, get, names
from deltafold.codecs.base import Settings
from deltafold.compressing.methods.budget import Budget, Unit, allot, reach, share_within
from deltafold.errors import UsageError

LOSSY = [name for name in names() if get(name).lossy]
# GQA attention, MLP and an expert of a 2048-wide model: no literals of one family anywhere.
SHAPES = [
    (2048, 2048),
    (512, 2048),
    (512, 2048),
    (2048, 2048),
    (5632, 2048),
    (2048, 5632),
    (768, 2048),
]


def units(method: str) -> list[Unit]:
    codec = delta_codec(method)
    return [
        Unit(
            str(n),
            shape,
            codec,
            np.arange(1, 1 + min(shape)) ** -0.5 if codec.uses_factors else None,
        )
        for n, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("method", LOSSY)
@pytest.mark.parametrize("ratio", [8, 32, 128])
@pytest.mark.parametrize("nominal", [True, False])
def test_bytes_come_out_as_asked(method: str, ratio: int, nominal: bool):
    matrices = units(method)
    total = sum(unit.raw_bytes for unit in matrices)

    def cost(picked: list[Settings]) -> int:
        return sum(
            (unit.codec.value_bytes if nominal else unit.codec.part_bytes)(unit.shape, settings)
            for unit, settings in zip(matrices, picked, strict=True)
        )

    chosen, left = allot(matrices, 1 / ratio, nominal)
    spent = cost(chosen)
    assert spent + left == pytest.approx(total / ratio)
    # Signs take one bit a weight at most: what is left then stays unspent.
    most = cost([unit.codec.settings_for(unit.shape, 1.0, unit.spectrum) for unit in matrices])
    usable = min(total / ratio, most)
    assert abs(spent - usable) < 0.01 * usable


@pytest.mark.parametrize("method", LOSSY)
def test_every_matrix_gets_its_share_whatever_its_shape(method: str):
    matrices = units(method)
    chosen, _ = allot(matrices, 1 / 16, nominal=True)
    for unit, picked in zip(matrices, chosen, strict=True):
        share = unit.codec.value_bytes(unit.shape, picked) / unit.raw_bytes
        assert share == pytest.approx(1 / 16, rel=0.06), unit.shape


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(LOSSY), st.floats(0.002, 0.5))
def test_allot_stays_within_its_reach(method: str, share: float):
    """Factors are computed for shares up to `reach`; `allot` must not look beyond."""
    matrices = units(method)
    chosen, _ = allot(matrices, share, nominal=False)
    for unit, picked in zip(matrices, chosen, strict=True):
        if "share" in picked:
            assert picked["share"] <= reach(unit.shape, share)
        if "rank" in picked:
            assert picked["rank"] <= unit.codec.components_for(unit.shape, reach(unit.shape, share))


def test_share_within():
    matrices = units("dare")
    total = sum(unit.raw_bytes for unit in matrices)
    assert share_within(matrices, total / 4) == pytest.approx(0.25)
    assert share_within(matrices, -5) == 0.0
    assert share_within(matrices, 9 * total) == 1.0
    assert share_within([], 100) == 0.0


def test_budget_reads_one_of_three():
    assert Budget.of() == Budget("file_ratio", 32.0)
    assert Budget.of(n_bytes=1000).target_bytes(5) == 1000
    assert Budget.of(file_ratio=10).target_bytes(500) == 50
    assert Budget.of(nominal_ratio=10).target_bytes(500) is None
    with pytest.raises(UsageError, match="--file-ratio and --bytes ask for different things"):
        Budget.of(file_ratio=2, n_bytes=5)
    for wrong in (0, -3, float("nan"), float("inf"), 0.5):
        with pytest.raises(UsageError, match="--file-ratio must be at least 1"):
            Budget.of(file_ratio=wrong)
