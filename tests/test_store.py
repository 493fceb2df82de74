"""Addresses in an object store, in place of paths: fsspec's store in memory stands in for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from checkpoints import PairFiles, make_pair, tree_hashes
from typer.testing import CliRunner

import deltafold
from deltafold.checkpoint import is_address, local_folder
from deltafold.checkpoint.store import Remote
from deltafold.cli import app
from deltafold.errors import CheckpointError, StorageError, UsageError
from deltafold.merging.recipe import Model, Recipe

METHOD = "svd-quant"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def pair(tmp_path: Path, store: fsspec.AbstractFileSystem) -> PairFiles:
    """A pair on disk; the same lies at memory://models/base and memory://models/math."""
    made = make_pair(tmp_path / "pair")
    for folder, name in ((made.base, "base"), (made.finetuned, "math")):
        for file in folder.iterdir():
            store.put_file(str(file), f"/models/{name}/{file.name}")
    return made


def stored(store: fsspec.AbstractFileSystem, root: str, into: Path) -> Path:
    for path in store.find(root):
        local = into / path.removeprefix(root).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(store.cat_file(path))
    return into


def test_compress_restore_and_merge_from_and_to_a_store(store, pair, tmp_path):
    record = deltafold.compress(
        "memory://models/base", "memory://models/math/", "memory://made/math.delta", METHOD,
        file_ratio=4,
    )  # fmt: skip
    deltafold.compress(pair.base, pair.finetuned, tmp_path / "math.delta", METHOD, file_ratio=4)
    found = stored(store, "/made/math.delta", tmp_path / "found.delta")
    assert tree_hashes(found) == tree_hashes(tmp_path / "math.delta")
    assert record["archive"] == "memory://made/math.delta"
    kept = json.loads(store.cat_file("/made/math.delta.record.json"))
    assert kept["archive"] == "memory://made/math.delta" and kept["totals"] == record["totals"]

    deltafold.restore(
        "memory://made/math.delta", "memory://models/base", "memory://made/math-again"
    )
    deltafold.restore(tmp_path / "math.delta", pair.base, tmp_path / "again")
    again = stored(store, "/made/math-again", tmp_path / "found-again")
    assert tree_hashes(again) == tree_hashes(tmp_path / "again")

    recipe = Recipe((Model("memory://made/math.delta"), Model("memory://models/math")), "ties")
    deltafold.merge(recipe, "memory://made/merged", base="memory://models/base")
    local = Recipe((Model(str(tmp_path / "math.delta")), Model(str(pair.finetuned))), "ties")
    deltafold.merge(local, tmp_path / "merged", base=pair.base)
    merged = stored(store, "/made/merged", tmp_path / "found-merged")
    assert tree_hashes(merged) == tree_hashes(tmp_path / "merged")
    assert not any((tmp_path / "cache" / "outputs").iterdir())


def test_command_line(store, pair, tmp_path):
    made = CliRunner().invoke(app, [
        "compress", "memory://models/base", "memory://models/math", "-o", "memory://made/m.delta",
        "-m", METHOD, "--file-ratio", "4",
    ])  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "memory://made/m.delta" in made.output
    assert "record in memory://made/m.delta.record.json" in made.output.replace("\n", " ")
    shown = CliRunner().invoke(app, ["inspect", "memory://made/m.delta"])
    assert shown.exit_code == 0, shown.output
    checked = CliRunner().invoke(
        app, ["verify", "memory://made/m.delta", "--base", "memory://models/base"]
    )
    assert checked.exit_code == 0, checked.output


def test_files_are_fetched_once_and_anew_when_they_changed(store, pair):
    first = local_folder("memory://models/math")
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert local_folder("memory://models/math") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    store.pipe_file("/models/math/config.json", b"{}")
    second = local_folder("memory://models/math")
    assert second != first and (second / "config.json").read_bytes() == b"{}"


def test_neither_pickles_nor_hidden_files_are_fetched_and_folders_are(store, pair):
    for name in ("weights.bin", "optimizer.pt", ".secret.safetensors", "sub/.cache/config.json"):
        store.pipe_file(f"/models/math/{name}", b"x")
    for name in ("2_Dense/model.safetensors", "2_Dense/config.json", "tekken.json"):
        store.pipe_file(f"/models/math/{name}", b"x")
    folder = local_folder("memory://models/math")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    plain = {path.name for path in pair.finetuned.iterdir()}
    assert found - plain == {"2_Dense/model.safetensors", "2_Dense/config.json", "tekken.json"}
    assert plain <= found


def test_one_file(store, pair):
    found = local_folder("memory://models/math/model.safetensors")
    assert found.read_bytes() == (pair.finetuned / "model.safetensors").read_bytes()


def test_an_output_that_exists_is_refused_before_work(store, pair):
    store.pipe_file("/made/math.delta/delta.json", b"old")
    with pytest.raises(UsageError, match=r"memory://made/math\.delta exists; .* --overwrite"):
        deltafold.compress(
            pair.base, pair.finetuned, "memory://made/math.delta", METHOD, file_ratio=4
        )
    assert store.find("/made") == ["/made/math.delta/delta.json"]
    store.pipe_file("/made/math.delta/payload-9.safetensors", b"old")
    deltafold.compress(
        pair.base, pair.finetuned, "memory://made/math.delta", METHOD, file_ratio=4, overwrite=True
    )
    assert store.cat_file("/made/math.delta/delta.json") != b"old"
    assert not store.exists("/made/math.delta/payload-9.safetensors")


def test_what_makes_it_a_model_is_stored_last(store, pair, monkeypatch):
    order: list[str] = []
    put = Remote._put
    monkeypatch.setattr(Remote, "_put", lambda s, a, path: (order.append(path), put(s, a, path)))
    deltafold.compress(pair.base, pair.finetuned, "memory://made/math.delta", METHOD, file_ratio=4)
    folder = [path for path in order if "record" not in path]
    assert folder[-1] == "/made/math.delta/delta.json" and len(folder) > 1


def test_a_store_that_fails_loses_nothing(store, pair, monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(Remote, "_put", fail)
        with pytest.raises(StorageError, match=r"no room.*What was made lies in") as caught:
            deltafold.compress(
                pair.base, pair.finetuned, "memory://made/math.delta", METHOD, file_ratio=4
            )
    made = Path(str(caught.value).rpartition("lies in ")[2].rstrip("."))
    deltafold.restore(made, pair.base, tmp_path / "again")
    with pytest.raises(UsageError, match="could not be stored"):
        deltafold.compress(
            pair.base, pair.finetuned, "memory://made/math.delta", METHOD, file_ratio=4
        )


def test_unfinished_work_goes_on(store, pair, monkeypatch):
    from deltafold.running.workspace import Workspace

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Workspace, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            deltafold.compress(
                pair.base, pair.finetuned, "memory://made/math.delta", METHOD, file_ratio=4
            )
    resumed: list[bool] = []
    publish = Workspace.publish
    monkeypatch.setattr(
        Workspace, "publish", lambda s, *a: (resumed.append(s.resumed), publish(s, *a))
    )
    deltafold.compress(pair.base, pair.finetuned, "memory://made/math.delta", METHOD, file_ratio=4)
    assert resumed == [True]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memory://models/nowhere", "memory://models/nowhere holds no checkpoint and no archive"),
        ("nosuch://bucket/base", "nosuch://bucket/base cannot be opened: Protocol not known"),
    ],
)
def test_what_is_not_there_is_refused_by_name(store, address, says):
    with pytest.raises((CheckpointError, UsageError), match=says):
        local_folder(address)


def test_a_missing_package_is_named(store, monkeypatch):
    def missing(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UsageError, match="s3://bucket/base: Install s3fs to access S3, with pip"):
        local_folder("s3://bucket/base")


@pytest.mark.parametrize("text", ["org/name", "/a/b", "c:/models", "base", "http:", "a:b"])
def test_what_is_no_address(text):
    assert not is_address(text)
