"""Power failures: whatever of a run is on the disk then, the same command ends in the same result.

By default a few moments of each verb; DELTAFOLD_POWER=200 for more, DELTAFOLD_SEED for others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import tree_hashes
from power import State, failures, recorded, reset
from test_damaged_work import VERBS, Verb

from deltafold.checkpoint import disk, sealed
from deltafold.running.workspace import partial_path

NUMBER = int(os.environ.get("DELTAFOLD_POWER", "8"))
SEED = int(os.environ.get("DELTAFOLD_SEED", "1"))

pytestmark = pytest.mark.filterwarnings("ignore::deltafold.errors.StorageWarning")


@pytest.mark.parametrize("make", VERBS)
def test_a_run_after_a_power_failure(make: Callable[[Path], Verb], tmp_path: Path) -> None:
    verb, root = make(tmp_path / "inputs"), tmp_path / "disk"
    root.mkdir()
    verb(root / "out")
    whole = tree_hashes(root / "out")
    reset(root, State.of(_empty(tmp_path)))
    for folder in failures(root, lambda: verb(root / "out"), SEED, NUMBER, tmp_path / "cut"):
        disk.remove(root)
        shutil.copytree(folder, root)
        sealed.forget(tmp_path)
        if not (root / "out").exists():
            verb(root / "out")
        assert tree_hashes(root / "out") == whole, folder.name


def test_overwriting_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    from checkpoints import make_pair

    from deltafold import compress

    pair, root = make_pair(tmp_path / "inputs"), tmp_path / "disk"
    root.mkdir()
    compress(pair.base, pair.finetuned, root / "out", "lossless")
    old = tree_hashes(root / "out")

    def run() -> None:
        compress(pair.base, pair.finetuned, root / "out", "impart", file_ratio=8, overwrite=True)

    compress(pair.base, pair.finetuned, tmp_path / "new", "impart", file_ratio=8)
    new = tree_hashes(tmp_path / "new")
    for folder in failures(root, run, SEED, 2 * NUMBER, tmp_path / "cut"):
        disk.remove(root)
        shutil.copytree(folder, root)
        sealed.forget(tmp_path)
        assert tree_hashes(root / "out") in (old, new), folder.name
        run()
        assert tree_hashes(root / "out") == new
        assert not partial_path(root / "out").exists()


def test_the_recorder_loses_what_was_not_synced(tmp_path: Path) -> None:
    """A file that was renamed but never synced may be anything; a synced one is what it was."""
    root = tmp_path / "disk"
    root.mkdir()
    seen = set()
    for seed in range(60):
        reset(root, State.of(_empty(tmp_path)))
        with recorded(root, seed, frozenset([4])) as found:
            (root / "synced").write_bytes(b"here")
            disk.sync(root / "synced")
            disk.sync(root)
            (root / "tmp").write_bytes(b"bytes")
            disk.rename(root / "tmp", root / "other")
            disk.sync(tmp_path)
            disk.rename(root / "other", root / "third")
        (state,) = found.cut
        target = tmp_path / f"cut {seed}"
        state.write(target)
        assert (target / "synced").read_bytes() == b"here"
        assert not (target / "tmp").exists()
        other = target / "other"
        seen.add(other.read_bytes() if other.exists() else None)
    assert {None, b"", b"bytes", bytes(5)} <= seen


def _empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir(exist_ok=True)
    return folder
