"""The frontier of methods: averages over seeds, what `auto` gains, tables, figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from reporting_records import COMMON

from deltafold.reporting.drawings.frontier import dots_of, size_ticks
from deltafold.reporting.figures import figures_of
from deltafold.reporting.frontier import advantage, bytes_at, gain_kept, grid, ordered
from deltafold.reporting.records import FrontierRecord, understood
from deltafold.reporting.table import Strong, Table
from deltafold.reporting.tables import tables_of
from deltafold.reporting.tables.frontier import PARTS, frontier_tables
from deltafold.reporting.units import norm_text, plain_text

CHECKPOINT_BYTES = 256_000_000


def row(method: str, asked: float, kl: float, seed: int = 0, **values: Any) -> dict[str, Any]:
    got = values.pop("got", asked)
    line = {"finetune": "sums", "method": method, "asked_file_ratio": asked, "seed": seed, "kl": kl,
            "file_ratio": got, "archive_bytes": round(CHECKPOINT_BYTES / got),
            "exact_match": 0.9 - kl}  # fmt: skip
    return line | values


def record_of(rows: list[dict[str, Any]], **values: Any) -> FrontierRecord:
    reference = {"base": {"kl": 2.4, "exact_match": 0.1}, "fine-tune": {"exact_match": 0.9}}
    record = COMMON | {
        "kind": "frontier", "title": "Small", "model": "a model", "rows": rows,
        "data": {"sums": "task sums, 100 held-out rows"}, "relative_delta_norm": {"sums": 0.00811},
        "reference": {"sums": reference},
    }  # fmt: skip
    known = understood(record | values)
    assert isinstance(known, FrontierRecord)
    return known


def full() -> FrontierRecord:
    """Auto with KL = 1e-4 (ratio / 16)^2, three seeds 10 % apart; two rivals; bitdelta of one size."""
    rows = [
        row("auto", ratio, 1e-4 * (ratio / 16) ** 2 * factor, seed)
        for ratio in (16.0, 32.0, 64.0, 128.0)
        for seed, factor in enumerate((0.9, 1.0, 1.1))
    ]
    rows += [row("delta-come", ratio, 9e-4 * ratio / 32) for ratio in (16.0, 32.0, 64.0, 128.0)]
    rows += [row("dare-qt", 32.0, 3e-3)]
    rows += [row("bitdelta", 8.0, 0.02, got=15.8), row("bitdelta", 16.0, 0.02)]
    unmet = {"finetune": "sums", "method": "bitdelta", "asked_file_ratio": 128.0, "seed": 0}
    rows += [unmet | {"codec_version": 1, "unmet": "File ratio 128 cannot be met: ..."}]
    for line in rows:
        if line["asked_file_ratio"] == 32.0 and line["seed"] == 0:
            line |= {"compress_seconds": 20.0 + len(line["method"]), "peak_memory_bytes": 5e8}
        if line["method"] == "auto" and line["asked_file_ratio"] == 32.0 and line["seed"] == 0:
            line |= {"restore_seconds": 4.0, "restore_peak_memory_bytes": 4e8}
    return record_of(rows)


def cells(table: Table) -> dict[str, list[str]]:
    """Rows by their first cell, bold cells as ** **."""
    plain = [[f"**{c.text}**" if isinstance(c, Strong) else c for c in r] for r in table.rows]
    return {r[0]: r[1:] for r in plain}


# --- the computation ----------------------------------------------------------------------------


def test_between_two_sizes_log_kl_is_linear_in_log_bytes() -> None:
    curve = [(1e6, 1e-1), (1e8, 1e-3)]
    n_bytes, bound = bytes_at(curve, 1e-2)
    assert (n_bytes, bound) == (pytest.approx(1e7), "")
    assert bytes_at(curve, 10**-1.5)[0] == pytest.approx(10**6.5)
    assert bytes_at([*curve, (1e7, 2e-2)], 2e-2) == (pytest.approx(1e7), "")


def test_beyond_the_sizes_measured_there_is_only_a_bound() -> None:
    curve = [(1e6, 1e-2), (1e7, 1e-3)]
    assert bytes_at(curve, 2e-2) == (1e6, "more than")
    assert bytes_at(curve, 1e-2) == (1e6, "more than")
    assert bytes_at(curve, 5e-4) == (1e7, "less than")


def test_a_lucky_small_archive_does_not_count() -> None:
    curve = [(1e5, 1e-3), (1e6, 1e-1), (1e8, 1e-3)]
    assert bytes_at(curve, 1e-2) == (pytest.approx(1e7), "")


def test_an_exact_archive_has_a_logarithm_too() -> None:
    n_bytes, bound = bytes_at([(1e6, 1e-1), (1e7, 0.0)], 1e-2)
    assert 1e6 < n_bytes < 1e7
    assert bound == ""


def test_auto_against_the_best_rival() -> None:
    points = grid(full(), "sums")
    gain = advantage(points)
    assert gain is not None
    assert (gain.rival.method, gain.kl) == ("delta-come", pytest.approx(9e-4))
    # auto reaches 9e-4 where (ratio / 16)^2 = 9: at ratio 48, so 1.5 times smaller than at 32
    assert gain.bound == ""
    assert gain.factor == pytest.approx(1.5, rel=1e-4)
    del points["delta-come"]
    other = advantage(points)
    assert other is not None
    assert other.rival.method == "dare-qt"
    assert other.factor == pytest.approx(math.sqrt(30) * 16 / 32, rel=1e-4)
    del points["dare-qt"]
    assert advantage(points) is None


def test_gain_kept_is_the_way_from_base_to_fine_tune() -> None:
    record = full()
    points = grid(record, "sums")
    # 0.9 - KL at ratio 64, on a way from 0.1 to 0.9
    assert gain_kept(record, "sums", points) == pytest.approx(1 - 1.6e-3 / 0.8)
    assert gain_kept(record_of([row("auto", 32.0, 0.1)]), "sums", points) is not None
    none_to_gain = {"sums": {"base": {"exact_match": 0.9}, "fine-tune": {"exact_match": 0.9}}}
    assert gain_kept(record_of([], reference=none_to_gain), "sums", points) is None
    assert gain_kept(record, "sums", grid(record_of([row("auto", 32.0, 0.1)]), "sums")) is None


def test_auto_stands_first_then_the_best() -> None:
    assert ordered(grid(full(), "sums")) == ["auto", "delta-come", "dare-qt", "bitdelta"]


# --- tables -------------------------------------------------------------------------------------


def test_kl_by_method_and_size() -> None:
    (table,) = frontier_tables(full(), ["kl"])
    assert table.title == "Small, sums: KL from the fine-tune"
    assert list(table.columns) == ["method", "8x", "16x", "32x", "64x", "128x"]
    rows = cells(table)
    assert rows["auto"] == [
        "", "**0.000100 ± 0.000010**", "**0.000400 ± 0.000040**", "**0.00160 ± 0.00016**",
        "0.00640 ± 0.00064",
    ]  # fmt: skip
    assert rows["delta-come"][-1] == "**0.00360**"
    assert rows["bitdelta"] == ["0.0200 (15.8x)", "0.0200", "", "", "–"]
    notes = " ".join(table.notes)
    assert "Norm of the delta: 0.81 %" in notes
    assert "Base alone: 2.40." in notes
    assert "task sums, 100 held-out rows" in notes
    assert "up to 3 seeds" in notes
    assert "Example CPU" in table.notes[-1]


def test_exact_match_by_method_and_size() -> None:
    (table,) = frontier_tables(full(), ["exact-match"])
    rows = cells(table)
    assert rows["delta-come"][2] == "89.9 %"
    assert rows["auto"][3] == "**89.8 ± 0.0 %**"
    assert rows["bitdelta"][0] == "88.0 % (15.8x)"  # no rival: not bold
    assert "Base alone: 10.0 %. Fine-tune alone: 90.0 %." in table.notes[0]


def test_where_all_are_alike_none_is_bold() -> None:
    rows = [row("auto", 32.0, 0.1), row("dare-qt", 32.0, 0.1)]
    for table in frontier_tables(record_of(rows), ["kl", "exact-match"]):
        assert not any(isinstance(cell, Strong) for line in table.rows for cell in line)
        assert "seeds" not in " ".join(table.notes)


def test_what_auto_gains() -> None:
    (table,) = frontier_tables(full(), ["gain"])
    assert cells(table) == {
        "sums": ["0.81 %", "delta-come", "0.000900", "8 MB", "5.33 MB", "**1.5x**", "99.8 %"]
    }
    assert table.notes[0] == (
        "At the divergence that the best rival has at 32x, auto's archive is smaller by a factor "
        "of 1.5x; at 64x it keeps 99.8 % of the gain in exact match."
    )


@pytest.mark.parametrize(
    ("kl", "size", "factor"),
    [(1e-6, "below 4 MB", "more than 2.0x"), (1.0, "above 16 MB", "less than 0.5x")],
)
def test_bounds_are_said(kl: float, size: str, factor: str) -> None:
    rows = [row("auto", ratio, kl) for ratio in (16.0, 64.0)] + [row("dare-qt", 32.0, 1e-3)]
    (table,) = frontier_tables(record_of(rows), ["gain"])
    assert cells(table)["sums"][4:6] == [size, f"**{factor}**"]
    assert f"by a factor of {factor};" in table.notes[0]


def test_without_auto_nothing_is_claimed() -> None:
    record = record_of([row("dare-qt", 32.0, 1e-3)])
    assert frontier_tables(record, ["gain"]) == []
    assert len(frontier_tables(record)) == 2  # KL and exact match; nothing was timed


def test_cost_counts_only_what_was_timed() -> None:
    (table,) = frontier_tables(full(), ["cost"])
    assert cells(table) == {
        "auto": ["24 s", "500 MB", "4 s", "400 MB"],
        "dare-qt": ["27 s", "500 MB", "–", "–"],
        "delta-come": ["30 s", "500 MB", "–", "–"],
    }


def test_report_knows_the_kind() -> None:
    assert len(tables_of(full())) == len(PARTS)


def test_small_numbers_have_no_exponent() -> None:
    assert plain_text(1.03e-5) == "0.0000103"
    assert plain_text(0.0) == "0"
    assert plain_text(12345.6) == "12,346"
    assert norm_text(0.0004) == "0.040 %"
    assert norm_text(None) == "–"


# --- figure -------------------------------------------------------------------------------------


def test_figure_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    (first,) = figures_of([full()], tmp_path / "a")
    (second,) = figures_of([full()], tmp_path / "b")
    assert first.name == "frontier-small.png"
    assert first.read_bytes() == second.read_bytes()
    other = record_of([row("auto", ratio, 0.1) for ratio in (16.0, 64.0)])
    (third,) = figures_of([other], tmp_path / "c")
    assert third.read_bytes() != first.read_bytes()


def test_dots_are_means_between_the_seeds() -> None:
    dots = dots_of(grid(full(), "sums"))
    assert [n_bytes for n_bytes, *_ in dots["auto"]] == [2e6, 4e6, 8e6, 16e6]
    assert dots["auto"][-1][1:] == (pytest.approx(1e-4), 0.9 * 1e-4, pytest.approx(1.1e-4))
    assert dots["delta-come"][0] == (2e6, 36e-4, 36e-4, 36e-4)
    points = [point for cells in grid(full(), "sums").values() for point in cells.values()]
    assert size_ticks(points)[0] == (pytest.approx(32e6), "32 MB\n8x")


def test_nothing_to_draw(tmp_path: Path) -> None:
    exact = [row("auto", 16.0, 0.0), row("auto", 32.0, 0.0)]
    assert figures_of([record_of(exact), record_of([])], tmp_path / "none") == []
