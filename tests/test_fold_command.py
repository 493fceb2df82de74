"""`deltafold fold` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from evaluation_models import make_llama, make_tokenizer, save, write_rows
from folding_models import write_deep, write_text

from deltafold.errors import UsageError
from deltafold.running.request import parse_numbers


def test_numbers_of_blocks() -> None:
    assert parse_numbers("", "--protect") == []
    assert parse_numbers("0, 1,-1", "--protect") == [0, 1, -1]
    with pytest.raises(UsageError, match="write their numbers"):
        parse_numbers("first", "--protect")


@pytest.mark.integration
def test_the_command(tmp_path: Path, deltafold: Any) -> None:
    model, text = write_deep(tmp_path / "model", "llama"), write_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    planned = deltafold("fold", model, "-o", out, "--blocks", "2", "--dry-run")
    assert planned.returncode == 0 and "2 of 5 blocks go: 40.0% of layers" in planned.stdout
    assert not out.exists()
    done = deltafold(
        "fold", model, "-o", out, "-m", "mka", "-n", "1", "--calibration", text,
        "--max-tokens", "40", "--protect", "0,-1", "--explain", tmp_path / "why",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 5 blocks gone (20.0% of layers" in done.stdout
    assert "mka (npib, adjacent-pairs, average)" in done.stdout and "which keeps 0." in done.stdout
    assert "protected: 0, -1" in done.stdout and re.search(r"block \d folded into \d,", done.stdout)
    record = json.loads((tmp_path / "out.record.json").read_text())
    assert record["kind"] == "fold" and record["settings"]["protect"] == [0, -1]
    assert (tmp_path / "why/similarity-00.csv").is_file()
    wrong = deltafold("fold", model, "-o", tmp_path / "x", "-n", "1", "-m", "mkka")
    assert wrong.returncode == 2 and "did you mean 'mka'" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    again = deltafold("fold", model, "-o", out, "-n", "1", "-m", "reverse")
    assert again.returncode == 2 and "exists" in again.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.integration
def test_before_and_after_on_tasks(tmp_path: Path, deltafold: Any) -> None:
    """The model answers before and after; the record says so, and report shows it."""
    from deltafold.reporting.tables import tables_of

    model = save(make_llama(1).bfloat16(), tmp_path / "model", make_tokenizer())
    rows = [{"prompt": f"{n}+1=", "choices": list("abcd"), "answer": n % 4} for n in range(8)]
    task = write_rows(tmp_path / "sums.jsonl", rows)
    done = deltafold(
        "fold", model, "-o", tmp_path / "out", "-m", "reverse", "-n", "1", "--calibration", "none",
        "--task", task, "--limit", "6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.record.json").read_text())
    whole, folded = record["scores"]
    assert whole["metrics"]["tasks"]["sums"]["accuracy"]["n"] == 6
    assert folded["weight_bytes"] < whole["weight_bytes"] and folded["tokens_per_second"] > 0
    assert "whole: sums" in done.stdout and "folded: sums" in done.stdout
    shown = "\n".join(table.markdown() for table in tables_of(record))
    assert "| folded |" in shown and "tokens/s" in shown
    wrong = deltafold("fold", model, "-o", tmp_path / "x", "-m", "reverse", "-n", "1",
                      "--calibration", "none", "--task", tmp_path / "none.jsonl")  # fmt: skip
    assert wrong.returncode != 0 and "none.jsonl" in wrong.stderr
    assert not (tmp_path / "x").exists()
