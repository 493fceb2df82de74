"""A run that is killed goes on where it stopped, and ends with the bytes of an unbroken run."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PairFiles, make_pair, tree_hashes
from forks import killed_in_a_fork
from processes import Processes
from refusals import nothing_left, refused

from deltafold import compress, restore
from deltafold.errors import ResumeError, StorageWarning
from deltafold.running import workspace
from deltafold.running.engine import Step
from deltafold.running.workspace import Workspace, partial_path

# Share of all renames of a run, the output's own included.
MOMENTS = [
    pytest.param(share, marks=() if share in (0.0, 0.4, 0.8, 1.0) else pytest.mark.integration)
    for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
]
RATIO: dict[str, Any] = {"method": "impart", "file_ratio": 8, "workers": 2}


def counted_renames(action: Callable[[], object]) -> int:
    """How many files `action` gives their names."""
    count = 0
    rename = Path.replace

    def counting(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counting)
        action()
    return count


def kill_at(moment: int, after: bool, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed at its rename number `moment`; False if none was."""

    def killing() -> None:
        left = iter(range(moment))
        rename = Path.replace

        def replace(self: Path, target: Path) -> Path:
            if next(left, None) is not None:
                return rename(self, target)
            if after:
                rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        Path.replace = replace  # type: ignore[method-assign]
        action()

    return killed_in_a_fork(killing)


@pytest.fixture(scope="module")
def unbroken(
    _template: PairFiles, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, int]]:
    """By method: the archive of a run that nothing broke off, and how many files it named."""
    folder, made = tmp_path_factory.mktemp("unbroken"), dict[str, tuple[Path, int]]()

    def found(method: str) -> tuple[Path, int]:
        if method not in made:
            out, options = folder / f"{method}.delta", RATIO | {"method": method}
            total = counted_renames(
                lambda: compress(_template.base, _template.finetuned, out, **options)
            )
            made[method] = (out, total)
        return made[method]

    return found


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("share", MOMENTS)
def test_killed_compress(
    pair: PairFiles,
    archive: Path,
    unbroken: Callable[[str], tuple[Path, int]],
    share: float,
    after: bool,
) -> None:
    out = archive.parent / "out.delta"

    def run() -> None:
        compress(pair.base, pair.finetuned, out, **RATIO)

    _, total = unbroken("impart")
    moment = round(share * (total - 2))  # the output's rename; the last one is the record's
    assert kill_at(moment, after, run)
    published = share == 1.0 and after
    assert out.exists() == published
    if published:
        assert tree_hashes(out) == tree_hashes(archive)
        return
    assert partial_path(out).is_dir()
    run()
    assert tree_hashes(out) == tree_hashes(archive)
    assert not partial_path(out).exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_killed_compress_to_a_size(
    pair: PairFiles, unbroken: Callable[[str], tuple[Path, int]], tmp_path: Path, share: float
) -> None:
    """`auto` encodes more than once, until the size is met: rounds that were left over do no harm."""
    options = RATIO | {"method": "auto"}

    def run() -> None:
        compress(pair.base, pair.finetuned, tmp_path / "out.delta", **options)

    whole, total = unbroken("auto")
    assert kill_at(round(share * (total - 2)), False, run)
    assert partial_path(tmp_path / "out.delta").is_dir()
    run()
    assert tree_hashes(tmp_path / "out.delta") == tree_hashes(whole)
    assert not partial_path(tmp_path / "out.delta").exists()


def test_killed_twice_on_the_way_to_a_size(
    pair: PairFiles, unbroken: Callable[[str], tuple[Path, int]], tmp_path: Path
) -> None:
    options = RATIO | {"method": "auto", "workers": 1}
    out = tmp_path / "out.delta"
    for moment in (6, 9):
        assert kill_at(moment, True, lambda: compress(pair.base, pair.finetuned, out, **options))
    compress(pair.base, pair.finetuned, out, **options)
    assert tree_hashes(out) == tree_hashes(unbroken("auto")[0])


@pytest.fixture(scope="module", params=[1, 3], ids=lambda shards: str(shards))
def restored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path, int]:
    """Base, archive, what it restores to, and how many files that named; by number of shards."""
    folder = tmp_path_factory.mktemp("restored")
    pair = make_pair(folder, shards=request.param)
    archive, whole = folder / "x.delta", folder / "whole"
    compress(pair.base, pair.finetuned, archive, **RATIO)
    total = counted_renames(lambda: restore(archive, pair.base, whole, workers=2))
    return pair.base, archive, whole, total


@pytest.mark.parametrize("share", MOMENTS)
def test_killed_restore(
    restored: tuple[Path, Path, Path, int], tmp_path: Path, share: float
) -> None:
    base, archive, whole, total = restored
    out = tmp_path / "out"
    assert kill_at(
        round(share * (total - 2)), False, lambda: restore(archive, base, out, workers=2)
    )
    assert not out.exists()
    restore(archive, base, out)
    assert tree_hashes(out) == tree_hashes(whole)
    assert not partial_path(out).exists()


def test_killed_twice(pair: PairFiles, archive: Path) -> None:
    out = archive.parent / "out.delta"

    def run() -> None:
        compress(pair.base, pair.finetuned, out, **RATIO)

    for _ in range(3):
        assert kill_at(12, True, run)
    run()
    assert tree_hashes(out) == tree_hashes(archive)


@pytest.mark.parametrize("before_the_end", [1, 2, 3])
def test_killed_between_old_and_new_output(
    pair: PairFiles, archive: Path, lossless_archive: Path, before_the_end: int
) -> None:
    """With --overwrite there is no instant without a whole output, the old one or the new one."""
    old, new = tree_hashes(lossless_archive), tree_hashes(archive)

    def run() -> None:
        compress(pair.base, pair.finetuned, lossless_archive, overwrite=True, **RATIO)

    backup = shutil.copytree(lossless_archive, archive.parent / "backup")
    total = counted_renames(run)
    shutil.rmtree(lossless_archive)
    backup.rename(lossless_archive)
    assert kill_at(total - before_the_end, False, run)
    assert tree_hashes(lossless_archive) in (old, new)
    run()
    assert tree_hashes(lossless_archive) == new
    assert not partial_path(lossless_archive).exists()


def test_going_on_repeats_nothing(
    pair: PairFiles, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = archive.parent / "out.delta"

    def run(progress: Any = None) -> None:
        compress(pair.base, pair.finetuned, out, progress=progress, **RATIO)

    with monkeypatch.context() as patch:

        def stop(self: Workspace, *_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(workspace.Workspace, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    done: list[Step] = []
    run(done.append)
    assert done == []
    assert tree_hashes(out) == tree_hashes(archive)


# --- other inputs or settings ---------------------------------------------------------------------


@pytest.fixture
def unfinished(pair: PairFiles, tmp_path: Path) -> Path:
    out = tmp_path / "out.delta"
    assert kill_at(15, True, lambda: compress(pair.base, pair.finetuned, out, **RATIO))
    return out


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"seed": 1}, "(seed)"),
        ({"file_ratio": 9}, "(budget)"),
        ({"method": "dare"}, "method"),
        ({"beta": 0.7}, "(settings)"),
        ({"fallback": False}, "(fallback)"),
    ],
)
def test_other_settings_are_refused(
    pair: PairFiles, unfinished: Path, changed: dict[str, Any], name: str
) -> None:
    options = RATIO | changed
    refused(
        ResumeError,
        lambda: compress(pair.base, pair.finetuned, unfinished, **options),
        name,
        str(partial_path(unfinished)),
        "--restart",
    )
    assert partial_path(unfinished).is_dir()
    compress(pair.base, pair.finetuned, unfinished, restart=True, **options)
    assert unfinished.is_dir()
    assert not partial_path(unfinished).exists()


@pytest.mark.parametrize(("side", "word"), [("base", "(base)"), ("finetuned", "(fine-tune)")])
def test_other_inputs_are_refused(pair: PairFiles, unfinished: Path, side: str, word: str) -> None:
    folder = getattr(pair, side)
    (folder / "tokenizer.json").write_text("{}")
    refused(ResumeError, lambda: compress(pair.base, pair.finetuned, unfinished, **RATIO), word)


def test_weights_written_anew_are_other_inputs(pair: PairFiles, unfinished: Path) -> None:
    weights = pair.finetuned / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(
        ResumeError,
        lambda: compress(pair.base, pair.finetuned, unfinished, **RATIO),
        "(fine-tune)",
    )


def test_workers_and_memory_are_no_settings(
    pair: PairFiles, archive: Path, unfinished: Path
) -> None:
    options = RATIO | {"workers": 1, "memory_bytes": 1 << 22}
    compress(pair.base, pair.finetuned, unfinished, **options)
    assert tree_hashes(unfinished) == tree_hashes(archive)


def test_a_restore_does_not_go_on_with_another_archive(
    pair: PairFiles, archive: Path, tmp_path: Path
) -> None:
    """Same fine-tune, same sizes, another seed: half of each would be a model of nobody."""
    other, out = tmp_path / "other.delta", tmp_path / "out"
    compress(pair.base, pair.finetuned, other, seed=1, **RATIO)
    assert kill_at(10, True, lambda: restore(archive, pair.base, out))
    refused(ResumeError, lambda: restore(other, pair.base, out), "(archive)")
    restore(other, pair.base, out, restart=True)
    restore(other, pair.base, tmp_path / "unbroken")
    assert tree_hashes(out) == tree_hashes(tmp_path / "unbroken")


@pytest.mark.parametrize("damage", ["{", "", '{"command": "compress"}', "[" * 100_000])
def test_work_with_a_damaged_journal_is_begun_anew(
    pair: PairFiles, archive: Path, unfinished: Path, damage: str
) -> None:
    """Nobody can tell what the work was of, and nothing but time is lost."""
    (partial_path(unfinished) / "journal.json").write_text(damage)
    with pytest.warns(StorageWarning, match=r"journal\.json is damaged.*begun anew"):
        compress(pair.base, pair.finetuned, unfinished, **RATIO)
    assert tree_hashes(unfinished) == tree_hashes(archive)


def test_a_folder_that_may_be_someone_else_s_is_not_cleared(
    pair: PairFiles, tmp_path: Path
) -> None:
    """A journal that we cannot read, and no lock of ours: clearing it has to be asked for."""
    out = tmp_path / "out.delta"
    partial_path(out).mkdir()
    (partial_path(out) / "journal.json").write_text("Dear diary")
    (partial_path(out) / "poems.txt").write_text("mine")
    (partial_path(out) / "lock").write_text("")
    refused(ResumeError, lambda: compress(pair.base, pair.finetuned, out, **RATIO), "--restart")
    assert (partial_path(out) / "poems.txt").read_text() == "mine"


# --- Ctrl-C ---------------------------------------------------------------------------------------

SLOW = """
import time
import importlib
module = importlib.import_module("deltafold.{module}")
quick = module.{function}
def slow(*arguments, **options):
    time.sleep(0.2)
    return quick(*arguments, **options)
module.{function} = slow
from deltafold.cli import main
main()
"""


def interrupted(
    processes: Processes,
    slow: tuple[str, str],
    waits_for: Path,
    *arguments: object,
    by: signal.Signals = signal.SIGINT,
) -> tuple[int, str]:
    """Run the command line, slowed down; a signal when `waits_for` exists. (exit code, stderr)"""
    process = processes.start("-c", SLOW.format(module=slow[0], function=slow[1]), *arguments)
    deadline = time.monotonic() + 120
    while not waits_for.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(by)
    ended = process.wait()
    return ended.returncode, ended.stderr


def test_interrupted_compress(pair: PairFiles, archive: Path, processes: Processes) -> None:
    out = archive.parent / "out.delta"
    code, told = interrupted(
        processes,
        ("codecs.tensors", "truncated_svd"),
        partial_path(out) / "factors",
        "compress", pair.base, pair.finetuned, "-o", out, "-m", "impart", "--file-ratio", 8,
    )  # fmt: skip
    assert code == 130
    assert told.strip() == (
        "deltafold: stopped; run the same command again and it goes on where it was."
    )
    assert not out.exists()
    compress(pair.base, pair.finetuned, out, "impart", file_ratio=8)
    assert tree_hashes(out) == tree_hashes(archive)


@pytest.mark.parametrize(("by", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_restore(
    pair: PairFiles, archive: Path, processes: Processes, by: signal.Signals, exit_code: int
) -> None:
    out = archive.parent / "out"
    code, told = interrupted(
        processes,
        ("restoring.restore", "checked_rows"),
        partial_path(out) / "done",
        "restore", archive, "--base", pair.base, "-o", out, by=by,
    )  # fmt: skip
    assert code == exit_code
    assert told.count("\n") <= 2
    assert "goes on" in told
    assert not out.exists()
    restore(archive, pair.base, out)
    restore(archive, pair.base, archive.parent / "unbroken")
    assert tree_hashes(out) == tree_hashes(archive.parent / "unbroken")


def test_a_refused_request_leaves_nothing_to_go_on_with(pair: PairFiles, tmp_path: Path) -> None:
    from deltafold.errors import BudgetError

    out = tmp_path / "out.delta"
    refused(BudgetError, lambda: compress(pair.base, pair.finetuned, out, n_bytes=3000))
    nothing_left(out)
