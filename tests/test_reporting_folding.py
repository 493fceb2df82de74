"""Records of `fold` as tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltafold.errors import DeltafoldError
from deltafold.reporting.figures import figures_of
from deltafold.reporting.records import understood
from deltafold.reporting.tables import tables_of


def fold_record(**more: Any) -> dict[str, Any]:
    """Six blocks, of which the fourth went into the third and the last by itself."""
    near = [[round(1 - 0.06 * abs(i - j), 3) for j in range(7)] for i in range(7)]
    return {
        "record_version": 1, "kind": "fold", "model": "m", "output": "out/smaller", "blocks": 6,
        "method": {"name": "mka"}, "kept": [0, 1, 2, 4], "seconds": 3.5,
        "removed": {"blocks": [3, 5], "layer_share": 1 / 3, "parameter_share": 0.25},
        "steps": [{"kept": 2, "gone": [3], "ratio": 0.62, "score": 0.62},
                  {"kept": None, "gone": [5], "ratio": None, "score": None}],
        "similarity": {"name": "npib", "values": near},
        "quality": {"model": {"perplexity": 20.0, "kl": 0.0, "agreement": 1.0},
                    "folded": {"perplexity": 31.5, "kl": 0.8, "agreement": 0.61}},
    } | more  # fmt: skip


def test_tables() -> None:
    totals, quality, steps = (table.markdown() for table in tables_of(fold_record()))
    assert "2 of 6: 3, 5" in totals and "33.3" in totals and "25" in totals
    assert "31.5" in quality and "folded" in quality
    assert "0.620" in steps
    assert len(tables_of(fold_record(quality={}, steps=[]))) == 1
    silent = tables_of(fold_record(silenced=[{"block": 1, "part": "mlp"}]))[0]
    assert "mlp of 1" in silent.markdown()


def test_a_record_that_lacks_what_went_is_refused() -> None:
    with pytest.raises(DeltafoldError, match=r"field removed"):
        understood(fold_record(removed={"blocks": [1]}))


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = figures_of([fold_record()], tmp_path)
    assert [path.name for path in drawn] == ["similarity-smaller.png", "folding-smaller.png"]
    again = figures_of([fold_record()], tmp_path / "again", dark=False)
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(drawn, again, strict=True)] == [
        True
    ] * 2
    assert figures_of([fold_record(steps=[], similarity=None)], tmp_path / "none") == []
