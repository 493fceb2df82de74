"""Outputs that exist, disks that are full, folders that cannot be written, two runs at once."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PairFiles, tree_hashes
from forks import in_a_fork
from refusals import nothing_left, refused

from deltafold import compress, restore
from deltafold.errors import BudgetError, CheckpointError, ResumeError, StorageError, UsageError
from deltafold.running.record import record_path, write_record
from deltafold.running.workspace import Workspace, partial_path

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
RATIO: dict[str, Any] = {"method": "impart", "file_ratio": 8}


def test_output_exists(pair: PairFiles, archive: Path) -> None:
    before = tree_hashes(archive)
    refused(
        UsageError,
        lambda: compress(pair.base, pair.finetuned, archive, **RATIO),
        str(archive),
        "--overwrite",
    )
    assert tree_hashes(archive) == before
    refused(UsageError, lambda: restore(archive, pair.base, pair.finetuned), str(pair.finetuned))


def test_overwrite(pair: PairFiles, archive: Path, lossless_archive: Path) -> None:
    expected = tree_hashes(archive)
    compress(pair.base, pair.finetuned, lossless_archive, overwrite=True, **RATIO)
    assert tree_hashes(lossless_archive) == expected
    assert not partial_path(lossless_archive).exists()
    out = archive.parent / "restored"
    restore(archive, pair.base, out)
    expected = tree_hashes(out)
    (out / "stale.json").write_text("{}")
    restore(archive, pair.base, out, overwrite=True)
    assert tree_hashes(out) == expected


def test_a_failing_overwrite_keeps_the_old_one(pair: PairFiles, archive: Path) -> None:
    before = tree_hashes(archive)
    refused(
        BudgetError,
        lambda: compress(pair.base, pair.finetuned, archive, n_bytes=5000, overwrite=True),
    )
    assert tree_hashes(archive) == before


def test_overwrite_never_removes_what_is_read(pair: PairFiles, archive: Path) -> None:
    before = tree_hashes(pair.base.parent)
    for output in (pair.base, pair.finetuned):
        refused(
            UsageError,
            lambda o=output: compress(pair.base, pair.finetuned, o, overwrite=True, **RATIO),
            str(output),
            "is what is read",
        )
    for output in (pair.base, archive):
        refused(
            UsageError, lambda o=output: restore(archive, pair.base, o, overwrite=True), str(output)
        )
    assert tree_hashes(pair.base.parent) == before


def test_overwrite_never_removes_a_folder_of_other_things(pair: PairFiles, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    refused(
        UsageError,
        lambda: compress(pair.base, pair.finetuned, home, overwrite=True, **RATIO),
        str(home),
        "neither an archive nor a checkpoint",
    )
    assert (home / "thesis.txt").read_text() == "years of work"
    partial = partial_path(tmp_path / "x.delta")
    home.rename(partial)
    refused(
        UsageError,
        lambda: compress(pair.base, pair.finetuned, tmp_path / "x.delta", restart=True, **RATIO),
        str(partial),
        "thesis.txt",
    )
    assert (partial / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_output_without_a_name(
    pair: PairFiles, archive: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(archive)
    before = tree_hashes(archive)
    refused(
        UsageError,
        lambda: compress(pair.base, pair.finetuned, output, overwrite=True, **RATIO),
        "names no new folder",
    )
    assert tree_hashes(archive) == before


def test_output_below_a_file(pair: PairFiles) -> None:
    output = pair.base / "config.json" / "x.delta"
    refused(StorageError, lambda: compress(pair.base, pair.finetuned, output, **RATIO), str(output))


def test_output_beside_a_file_of_the_partial_s_name(pair: PairFiles, tmp_path: Path) -> None:
    (tmp_path / "x.delta.partial").write_text("mine")
    refused(
        StorageError,
        lambda: compress(pair.base, pair.finetuned, tmp_path / "x.delta", **RATIO),
        "x.delta.partial",
    )
    assert (tmp_path / "x.delta.partial").read_text() == "mine"


# --- no space -------------------------------------------------------------------------------------


def failing_after(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(count))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise NO_SPACE
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("count", [0, 1, 9, 15])
def test_no_space_while_restoring(
    pair: PairFiles, archive: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, out = archive.parent / "unbroken", archive.parent / "out"
    restore(archive, pair.base, unbroken)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(count, os.pwrite))
        refused(StorageError, lambda: restore(archive, pair.base, out), "No space left", "out")
    assert not out.exists()
    restore(archive, pair.base, out)
    assert tree_hashes(out) == tree_hashes(unbroken)
    assert not partial_path(out).exists()


@pytest.mark.parametrize("count", [0, 5, 25, 45])
def test_no_space_while_compressing(
    pair: PairFiles, archive: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = archive.parent / "again.delta"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing_after(count, Path.replace))
        refused(
            StorageError,
            lambda: compress(pair.base, pair.finetuned, out, **RATIO),
            "No space left",
            "same command again",
        )
    assert not out.exists()
    compress(pair.base, pair.finetuned, out, **RATIO)
    assert tree_hashes(out) == tree_hashes(archive)


@pytest.mark.parametrize("limit_bytes", [0, 600, 20_000])
def test_file_size_limit(pair: PairFiles, archive: Path, limit_bytes: int) -> None:
    """The kernel itself refuses, in the middle of a file."""
    out = archive.parent / "again.delta"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        refused(
            StorageError,
            lambda: compress(pair.base, pair.finetuned, out, **RATIO),
            "No space left",
        )

    in_a_fork(limited)
    assert not out.exists()
    compress(pair.base, pair.finetuned, out, **RATIO)
    assert tree_hashes(out) == tree_hashes(archive)


def test_record_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.json"
    refused(StorageError, lambda: write_record({"record_version": 1}, path), str(path))


def test_record_in_a_new_folder(pair: PairFiles, tmp_path: Path) -> None:
    record = tmp_path / "records" / "of" / "today.json"
    compress(pair.base, pair.finetuned, tmp_path / "x.delta", "lossless", record=record)
    assert record.is_file()
    assert not record_path(tmp_path / "x.delta").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(pair: PairFiles, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    out = folder / "x.delta"
    refused(StorageError, lambda: compress(pair.base, pair.finetuned, out, **RATIO), str(out))
    nothing_left(out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_weights_that_cannot_be_read(pair: PairFiles, tmp_path: Path) -> None:
    (pair.base / "model.safetensors").chmod(0)
    out = tmp_path / "x.delta"
    refused(CheckpointError, lambda: compress(pair.base, pair.finetuned, out), "model.safetensors")
    nothing_left(out)


# --- two runs at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
def test_two_runs_at_once(pair: PairFiles, archive: Path, restart: bool) -> None:
    out = archive.parent / "again.delta"
    with Workspace(out, {"command": "compress"}):
        found = sorted(partial_path(out).iterdir())
        refused(
            UsageError,
            lambda: compress(pair.base, pair.finetuned, out, restart=restart, **RATIO),
            "Another deltafold",
            str(out),
        )
        assert sorted(partial_path(out).iterdir()) == found
    shutil.rmtree(partial_path(out))
    compress(pair.base, pair.finetuned, out, **RATIO)
    assert tree_hashes(out) == tree_hashes(archive)


def test_another_process_holds_the_lock(pair: PairFiles, archive: Path) -> None:
    out = archive.parent / "again.delta"
    with Workspace(out, {"command": "compress"}):
        in_a_fork(
            lambda: refused(
                UsageError,
                lambda: compress(pair.base, pair.finetuned, out, **RATIO),
                "Another deltafold",
            )
        )


def test_a_refusal_lets_go_of_the_lock(pair: PairFiles, archive: Path) -> None:
    """A caller in the same process may try again with what fits."""
    out = archive.parent / "again.delta"
    with Workspace(out, {"command": "restore"}):
        pass
    refused(ResumeError, lambda: compress(pair.base, pair.finetuned, out, **RATIO), "command")
    compress(pair.base, pair.finetuned, out, restart=True, **RATIO)
    assert tree_hashes(out) == tree_hashes(archive)
