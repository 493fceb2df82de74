"""`deltafold fold` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folding_models import write_deep, write_text

from deltafold.cli.fold import block_numbers
from deltafold.errors import UsageError


def test_numbers_of_blocks() -> None:
    assert block_numbers(None) == [] and block_numbers("0, 1,-1") == [0, 1, -1]
    with pytest.raises(UsageError, match="write their numbers"):
        block_numbers("first")


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
    record = json.loads((tmp_path / "out.record.json").read_text())
    assert record["kind"] == "fold" and record["settings"]["protect"] == [0, -1]
    assert (tmp_path / "why/similarity-00.csv").is_file()
    wrong = deltafold("fold", model, "-o", tmp_path / "x", "-n", "1", "-m", "mkka")
    assert wrong.returncode == 2 and "did you mean 'mka'" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    again = deltafold("fold", model, "-o", out, "-n", "1", "-m", "reverse")
    assert again.returncode == 2 and "exists" in again.stderr
    assert not (tmp_path / "x").exists()
