"""The report of a merge: figures by hand, tables, a drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reporting_records import COMMON

from deltafold.errors import DeltafoldError
from deltafold.reporting.figures import figures_of
from deltafold.reporting.records import understood
from deltafold.reporting.records.merge import MergedTensor
from deltafold.reporting.tables import tables_of
from deltafold.reporting.tables.merge import agreed, cosine


def merge_record(blocks: int = 4, **more: Any) -> dict[str, Any]:
    """Three models; block by block the second turns from the first."""
    tensors: list[dict[str, Any]] = [{"name": "n", "role": "other", "block": None}]  # integers
    for block in range(blocks):
        for role in ("attention", "mlp"):
            tensors.append({
                "name": f"model.layers.{block}.{role}", "role": role, "block": block,
                "norms": [3.0, 4.0, 0.0], "kept": [3.0, 2.0, 0.0], "brought": [1.0, 0.25, None],
                "cosines": [0.3 - 0.1 * block, 0.0, 0.0], "agreed": 0.5 + 0.02 * block,
                "shared": 100, "norm": 5.0,
            })  # fmt: skip
    models = ["math", "x/sql", "y/sql"]
    recipe = {"method": "ties", "sparsifier": "magnitude", "consensus": "ties"}
    return COMMON | {"kind": "merge", "base": "base", "output": "out/merged", "models": models,
                     "recipe": recipe, "notes": ["1 token (<x>) of math left out."],
                     "tensors": tensors} | more  # fmt: skip


def text_of(record: dict[str, Any]) -> str:
    return "\n".join(table.markdown() for table in tables_of(record))


def test_what_models_brought() -> None:
    """Two tensors of norm 4: the whole is sqrt(2) 4; kept half; a quarter in the merged."""
    text = text_of(merge_record(blocks=1))
    assert "| math | 4.24 | 100.0 % | 100.0 % |" in text
    assert "| x/sql | 5.66 | 50.0 % | 25.0 % |" in text
    assert "| y/sql | 0 | – | – |" in text
    assert "| **merged** | **7.07** |" in text and "1 token (" in text


def test_tensors_as_one() -> None:
    """(0.5 * 3 * 4 + 0) / sqrt((9 + 1) (16 + 1)), and 30 of 110 entries."""
    one = MergedTensor(name="a", norms=[3, 4], cosines=[0.5], agreed=0.2, shared=100)
    two = MergedTensor(name="b", norms=[1, 1], cosines=[0.0], agreed=1.0, shared=10)
    assert cosine([one, two], 0, (0, 1)) == pytest.approx(6 / 170**0.5)
    assert agreed([one, two]) == pytest.approx(30 / 110)
    nothing = MergedTensor(name="c", norms=[0, 1], cosines=[0.0], agreed=None, shared=0)
    assert cosine([nothing], 0, (0, 1)) is None and agreed([nothing]) is None


def test_search_and_scores() -> None:
    tried = [
        {
            "settings": {"scale": 0.4, "density": 0.2},
            "share_right": 0.5,
            "loss": 1.25,
            "kept": True,
        },
        {"settings": {"scale": 0.8, "density": 0.2}, "failed": "it gives NaN"},
    ]
    scores = [
        {"label": "base", "role": "base", "metrics": {"tasks": {"sums": {
            "exact_match": {"value": 0.1, "stderr": 0.03, "n": 100}}}}},
        {"label": "merged", "role": "merged", "metrics": {"perplexity": {"value": 9.5}, "tasks": {
            "sums": {"exact_match": {"value": 0.9, "stderr": 0.03}}, "rows": {
                "accuracy": {"value": 0.25}}}}},
    ]  # fmt: skip
    search = {"criterion": "share right", "tried": tried}
    text = text_of(merge_record(search=search, scores=scores))
    assert "| **0.4** | **0.2** | **50.0 %** | **1.25** | **kept** |" in text
    assert "| 0.8 | 0.2 | – | – | it gives NaN |" in text
    assert "| base | 10.0 ± 3.0 % | – | – |" in text
    assert "| **merged** | **90.0 ± 3.0 %** | **25.0 %** | **9.5** |" in text


def test_the_figure(tmp_path: Path) -> None:
    (path,) = figures_of([merge_record()], tmp_path)
    assert path.name == "delta-cosines-merged.png" and path.stat().st_size > 10_000
    again = figures_of([merge_record()], tmp_path / "again")[0]
    assert again.read_bytes() == path.read_bytes()
    alone = merge_record(models=["math"])
    for tensor in alone["tensors"][1:]:
        tensor |= {"norms": [3.0], "kept": [3.0], "brought": [1.0], "cosines": []}
    assert figures_of([alone], tmp_path / "alone") == [] and "math" in text_of(alone)
    assert figures_of([merge_record(blocks=0)], tmp_path / "none") == []


def test_a_record_that_lacks_something() -> None:
    broken = merge_record()
    del broken["models"]
    with pytest.raises(DeltafoldError, match="field models"):
        understood(broken, "x.json")


def test_report_of_a_real_merge(pair: Any, tmp_path: Path, deltafold: Any) -> None:
    done = deltafold("merge", pair.base, pair.finetuned, "-o", tmp_path / "m", "-m", "average")
    assert done.returncode == 0 and "100.0 %" in done.stdout
    shown = deltafold("report", tmp_path / "m", "--figures", tmp_path / "figures")
    assert shown.returncode == 0 and "Where models agree" in shown.stdout
    assert json.loads((tmp_path / "m.record.json").read_text())["kind"] == "merge"
