"""No byte of an archive depends on what folders are called, or on when files were written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PairFiles, tree_hashes
from refusals import refused

from deltafold import compress, export, inspect
from deltafold.errors import UsageError


@pytest.mark.parametrize(
    "options",
    [
        {"method": "impart", "file_ratio": 8},
        {"method": "auto", "n_bytes": 60_000},
        {"method": "lossless"},
    ],
    ids=lambda options: options["method"],
)
def test_other_names_and_times_give_the_same_archive(
    pair: PairFiles, tmp_path: Path, options: dict[str, Any]
) -> None:
    compress(pair.base, pair.finetuned, tmp_path / "a.delta", **options)
    base = pair.base.rename(tmp_path / "a base that was given a much longer name than before")
    finetuned = pair.finetuned.rename(tmp_path / "ft")
    for file in [*base.iterdir(), *finetuned.iterdir()]:
        os.utime(file, (1, 1))
    compress(base, finetuned, tmp_path / "b.delta", **options)
    assert tree_hashes(tmp_path / "a.delta") == tree_hashes(tmp_path / "b.delta")


def test_names_are_in_the_record(pair: PairFiles, tmp_path: Path) -> None:
    out = tmp_path / "x.delta"
    compress(pair.base, pair.finetuned, out, "lowrank", file_ratio=4)
    assert inspect(out)["base"] == str(pair.base)
    assert inspect(out)["finetuned"] == str(pair.finetuned)
    export(out, tmp_path / "adapter")
    (tmp_path / "x.delta.record.json").unlink()
    assert inspect(out)["base"] == ""
    refused(UsageError, lambda: export(out, tmp_path / "again"), "--base")
