"""Records of `share` as tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltafold.errors import DeltafoldError
from deltafold.reporting.figures import figures_of
from deltafold.reporting.records import understood
from deltafold.reporting.tables import tables_of
from deltafold.sharing.methods.replacing import Schedule


def share_record(**more: Any) -> dict[str, Any]:
    """Two of twelve blocks share; trained for 100 steps."""
    return {
        "record_version": 1, "kind": "share", "model": "m", "output": "out/shared", "blocks": 12,
        "method": {"name": "deltallm", "placement": "alternating", "matrices": "mlp"},
        "places": [{"block": 7, "anchor": 6, "rank": 16, "write_rank": 16},
                   {"block": 9, "anchor": None, "rank": 0, "write_rank": 0}],
        "base_parameters": 1000, "parameters": 880, "delta_parameters": 55,
        "base_weight_bytes": 2100, "weight_bytes": 1860, "seconds": 3.5,
        "quality": {"whole": {"perplexity": 20.0}, "start": {"perplexity": 31.5, "kl": 0.8},
                    "trained": {"perplexity": 22.5, "kl": 0.11}},
        "steps_done": 100, "best_step": 75, "tokens_per_second_training": 812.0,
        "text": {"source": "self", "tokens": 5000},
        "curve": [{"step": n, "loss": 3 - n / 50, "ce": 3 - n / 60, "kl": 1 - n / 120}
                  for n in range(1, 101)],
        "exams": [{"step": n, "ce": 3 - n / 60, "kl": 1 - n / 110} for n in range(0, 101, 25)],
        "replacement": {"modules": ["block 9 mlp", "block 7 mlp"], "steps": 100,
                        "points": Schedule().table(2, 100)},
        "search": [{"kl": 0.5, "rate": 1e-3, "kl_share": 0.5, "temperature": 2.0,
                    "replace_from": 0.3, "replace_until": 0.5, "replace_stagger": 0.5, "split": 1.0}],
    } | more  # fmt: skip


def test_tables() -> None:
    totals, blocks, quality, tried = (table.markdown() for table in tables_of(share_record()))
    assert "2 of 12" in totals and "880" in totals and "88" in totals and "1,860 B" in totals
    assert "block 6" in blocks and "nothing" in blocks and "none" in blocks
    assert "22.5" in quality and "trained" in quality
    assert "0.5" in tried
    bare = share_record(quality={}, search=[], steps_done=None)
    assert len(tables_of(bare)) == 2


def test_a_record_without_a_count_is_refused() -> None:
    record = share_record()
    del record["parameters"]
    with pytest.raises(DeltafoldError, match="field parameters"):
        understood(record)


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = figures_of([share_record()], tmp_path)
    assert [path.name for path in drawn] == ["loss-shared.png", "replacement-shared.png"]
    again = figures_of([share_record()], tmp_path / "again")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(drawn, again, strict=True))
    assert figures_of([share_record(curve=[], replacement=None)], tmp_path / "none") == []
