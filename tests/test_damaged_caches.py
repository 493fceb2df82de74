"""Damage in what is kept between runs: caches, and steps of commands that are several runs."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoints import PairFiles, tree_hashes
from forks import in_a_fork
from refusals import refused
from test_choosing import Folders
from test_choosing import folders as folders
from test_damaged_work import DAMAGES, _nudge, flipped

from deltafold import compress, merge
from deltafold.checkpoint import sealed
from deltafold.checkpoint.store import Remote, cache_root
from deltafold.compressing import choosing
from deltafold.errors import ResumeError, StorageError, StorageWarning, UsageError
from deltafold.merging import as_archive
from deltafold.merging.recipe import Model, Recipe
from deltafold.running import record as record_module
from deltafold.running.folders import WorkFolder
from deltafold.running.locks import LOCK, Lock, sweep
from deltafold.running.workspace import Workspace, partial_path

RATIO: dict[str, Any] = {"method": "impart", "file_ratio": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    """One file of each kind that holds something."""
    found = {
        (each.parent, each.suffix, each.name[:5]): each
        for each in sorted(folder.rglob("*"))
        if each.is_file() and each.stat().st_size
    }
    return list(found.values())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "auto", "file_ratio": 3},
        {"method": "auto", "file_ratio": 3, "calibration": "self", "samples": 3, "max_tokens": 9},
        {"method": "delta-come", "file_ratio": 3, "samples": 8, "max_tokens": 24},
    ],
    ids=["fisher", "self", "moments"],
)
def test_a_damaged_calibration_is_made_again(
    folders: Folders,
    tmp_path: Path,
    cache: Path,
    options: dict[str, Any],
    damage: Callable[[Path], None],
) -> None:
    base, tuned, text = folders
    if options["method"] == "delta-come":
        options = options | {"calibration": text}
    compress(base, tuned, tmp_path / "whole", **options)
    before = tree_hashes(tmp_path / "whole")
    kept = files(cache / "calibration")
    assert kept
    for number, file in enumerate(kept):
        damage(file)
        out = tmp_path / f"out{number}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compress(base, tuned, out, **options)
        words = [str(each.message) for each in said if each.category is StorageWarning]
        if damage is not Path.unlink:  # what is not there is just made
            assert any(file.name in each and "made again" in each for each in words), words
        assert tree_hashes(out) == before, file.name


# --- steps of commands that are several runs -------------------------------------------------------


class _Stop(KeyboardInterrupt):
    pass


def stop(*_: object, **__: object) -> None:
    raise _Stop


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_candidate_is_made_again(
    folders: Folders, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    base, tuned, _ = folders

    def run(out: Path) -> None:
        compress(base, tuned, out, "dare-qt", bits="auto", file_ratio=3, calibration="none")

    run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            choosing, "WorkFolder", type("Stopping", (WorkFolder,), {"put_in_place": stop})
        )
        with pytest.raises(_Stop):
            run(tmp_path / "out")
    folder = tmp_path / "out.candidates"
    kept = shutil.copytree(folder, tmp_path / "kept")
    for file in [each.relative_to(kept) for each in kept.rglob("*") if each.is_file()]:
        if file.name == LOCK:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(kept, folder)
        damage(folder / file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StorageWarning)
            run(tmp_path / "out")
        assert tree_hashes(tmp_path / "out") == tree_hashes(tmp_path / "whole"), file
        assert not folder.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_merge_on_the_way_to_an_archive(
    pair: PairFiles, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    other = shutil.copytree(pair.finetuned, tmp_path / "other")
    _nudge(other / "model.safetensors")
    recipe = Recipe((Model(str(pair.finetuned)), Model(str(other))), "ties")

    def run(out: Path) -> None:
        merge(recipe, out, base=pair.base, as_archive=True, archive_method="lossless")

    run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(as_archive, "archive_of", stop)
        with pytest.raises(_Stop):
            run(tmp_path / "out")
    kept = shutil.copytree(tmp_path / "out.merging", tmp_path / "kept")
    for file in [each.relative_to(kept) for each in kept.rglob("*") if each.is_file()]:
        if file.name == LOCK:
            continue
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "out.merging", ignore_errors=True)
        shutil.copytree(kept, tmp_path / "out.merging")
        damage(tmp_path / "out.merging" / file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StorageWarning)
            run(tmp_path / "out")
        assert tree_hashes(tmp_path / "out") == tree_hashes(tmp_path / "whole"), file


def test_a_damaged_adapter_is_exported_again(pair: PairFiles, tmp_path: Path, cache: Path) -> None:
    from deltafold.exporting.kept import find_adapter

    compress(pair.base, pair.finetuned, tmp_path / "x.delta", "lowrank", file_ratio=4)
    first = find_adapter("x", tmp_path / "x.delta", pair.base)
    whole = tree_hashes(first.folder)
    for file in [
        *first.folder.iterdir(),
        first.folder.with_name(f"{first.folder.name}.noted.json"),
    ]:
        flipped(file)
        with pytest.warns(StorageWarning, match=file.name):
            assert find_adapter("x", tmp_path / "x.delta", pair.base) == first
        assert tree_hashes(first.folder) == whole
    assert find_adapter("x", tmp_path / "x.delta", pair.base) == first


def test_a_damaged_copy_from_a_store_is_fetched_again(pair: PairFiles, cache: Path) -> None:
    store = fsspec.filesystem("memory")
    for file in pair.base.iterdir():
        store.put_file(str(file), f"/kept/base/{file.name}")
    folder = Remote.at("memory://kept/base").fetch(["*"])
    whole = tree_hashes(folder)
    for file in list(folder.iterdir()):
        flipped(file)
        with pytest.warns(StorageWarning, match=f"{file.name} is damaged; it is fetched again"):
            assert Remote.at("memory://kept/base").fetch(["*"]) == folder
        assert tree_hashes(folder) == whole


# --- inputs that change under unfinished work ------------------------------------------------------


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_an_input_that_changed_though_its_time_is_kept(
    pair: PairFiles, tmp_path: Path, side: str, tensor: str
) -> None:
    from deltafold.checkpoint import Checkpoint

    out = tmp_path / "out.delta"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "publish", stop)
        with pytest.raises(_Stop):
            compress(pair.base, pair.finetuned, out, **RATIO)
    file = getattr(pair, side) / "model.safetensors"
    kept = file.stat()
    with Checkpoint(file) as opened:
        info = opened.tensors[tensor]
    data = bytearray(file.read_bytes())
    data[info.start_bytes + info.n_bytes // 2] ^= 64
    file.write_bytes(data)
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    refused(
        ResumeError,
        lambda: compress(pair.base, pair.finetuned, out, **RATIO),
        "(base)" if side == "base" else "(fine-tune)",
        "--restart",
    )
    compress(pair.base, pair.finetuned, out, restart=True, **RATIO)
    compress(pair.base, pair.finetuned, tmp_path / "whole.delta", **RATIO)
    assert tree_hashes(out) == tree_hashes(tmp_path / "whole.delta")


# --- what happens after publishing, and where nothing can be kept ----------------------------------


def test_a_record_that_cannot_be_written_afterwards(
    pair: PairFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.delta"

    def full(path: Path, *_: object) -> None:
        raise StorageError(f"No space left while writing {path}.")

    monkeypatch.setattr(record_module.sealed, "put", _unless(sealed.put, full, "record.json"))
    with pytest.warns(StorageWarning, match=r"out\.delta is whole and in its place, but: .*record"):
        assert compress(pair.base, pair.finetuned, out, "lossless")["archive"] == str(out)
    assert (out / "delta.json").is_file() and not partial_path(out).exists()


def _unless(true: Callable[..., None], other: Callable[..., None], name: str) -> Any:
    return lambda path, *more: (other if path.name.endswith(name) else true)(path, *more)


def test_a_folder_that_cannot_be_removed_afterwards(
    pair: PairFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(self: Lock, last: str | None = None) -> None:
        self.release()
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Lock, "remove", busy)
    with pytest.warns(StorageWarning, match=r"out\.delta is whole .*cannot be removed"):
        compress(pair.base, pair.finetuned, tmp_path / "out.delta", "lossless")
    assert (tmp_path / "out.delta" / "delta.json").is_file()


def test_without_a_cache_a_run_does_without(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, _ = folders
    compress(base, tuned, tmp_path / "a.delta", "auto", file_ratio=3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(StorageWarning, match="DELTAFOLD_CACHE"):
        compress(base, tuned, tmp_path / "b.delta", "auto", file_ratio=3)
    assert tree_hashes(tmp_path / "a.delta") == tree_hashes(tmp_path / "b.delta")
    assert cache_root() != tmp_path / "file" / "cache"


# --- two at once -----------------------------------------------------------------------------------


def test_candidates_are_held_by_one_run(folders: Folders, tmp_path: Path) -> None:
    base, tuned, _ = folders
    with WorkFolder(tmp_path / "out", "candidates"):
        in_a_fork(
            lambda: refused(
                UsageError,
                lambda: compress(
                    base, tuned, tmp_path / "out", "dare-qt", bits="auto", file_ratio=3,
                    calibration="none",
                ),
                "Another deltafold",
            )
        )  # fmt: skip
        assert (tmp_path / "out.candidates" / LOCK).is_file()


def _takes_turns(folder: Path, tally: Path, rounds: int) -> None:
    for _ in range(rounds):
        lock = Lock(folder, "taken", waits=True)
        (folder / "mine").write_text(str(os.getpid()))
        before = int(tally.read_text())
        assert (folder / "mine").read_text() == str(os.getpid())
        tally.write_text(str(before + 1))
        lock.remove()


def test_a_folder_that_comes_and_goes_has_one_holder(tmp_path: Path) -> None:
    """Who waits for a lock while its folder is removed gets a new one, and never the old."""
    tally = tmp_path / "tally"
    tally.write_text("0")
    context = multiprocessing.get_context("fork")
    several = [
        context.Process(target=_takes_turns, args=(tmp_path / "held", tally, 50)) for _ in range(3)
    ]
    for each in several:
        each.start()
    for each in several:
        each.join()
    assert [each.exitcode for each in several] == [0, 0, 0]
    assert tally.read_text() == "150" and not (tmp_path / "held").exists()


def test_what_dead_processes_held_is_swept(tmp_path: Path) -> None:
    alive = Lock(tmp_path / "alive", "taken")
    Lock(tmp_path / "dead", "taken").release()
    (tmp_path / "other").mkdir()
    sweep(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == [
        "alive", "other",
    ]  # fmt: skip
    alive.release()


def test_an_output_that_came_into_being_meanwhile_stays(pair: PairFiles, tmp_path: Path) -> None:
    out = tmp_path / "out.delta"
    true = Workspace.publish

    def late(self: Workspace, *more: Any) -> None:
        out.mkdir()
        (out / "theirs").write_text("x")
        true(self, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "publish", late)
        refused(
            UsageError,
            lambda: compress(pair.base, pair.finetuned, out, "lossless"),
            "while this run was under way",
        )
    assert (out / "theirs").read_text() == "x"


# --- files that have changed places -----------------------------------------------------------------


def test_sealed_files_that_are_exchanged_fit_no_more(tmp_path: Path) -> None:
    """Each is whole, and none is what its name says."""
    one, two = tmp_path / "000001.json", tmp_path / "000002.json"
    three, four = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sealed.save_json(one, {"rank": 1})
    sealed.save_json(two, {"rank": 2})
    sealed.save_tensors(three, {"x": torch.ones(2)})
    sealed.save_tensors(four, {"x": torch.zeros(2)})
    for left, right in ((one, two), (three, four)):
        sealed.forget(tmp_path)
        assert sealed.fits(left)
        assert sealed.fits(right)
        data = left.read_bytes()
        left.write_bytes(right.read_bytes())
        right.write_bytes(data)
        sealed.forget(tmp_path)
        assert not sealed.fits(left)
        assert not sealed.fits(right)


def test_a_journal_in_whose_place_lies_another_result(pair: PairFiles, tmp_path: Path) -> None:
    """It is begun anew, with a word."""
    out = tmp_path / "out.delta"
    with Workspace(out, {"command": "x"}) as workspace:
        workspace.save_json("done/1.json", True)
    folder = partial_path(out)
    (folder / "journal.json").write_bytes((folder / "done" / "1.json").read_bytes())
    with (
        pytest.warns(StorageWarning, match="begun anew"),
        Workspace(out, {"command": "x"}) as again,
    ):
        assert not again.has("done/1.json")
