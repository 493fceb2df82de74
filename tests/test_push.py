"""Archives on the hub: pushed, carded, fetched and used by their id; against a stand-in for it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, running
from reporting_records import compress_record
from test_reporting_merge import merge_record

import deltafold
from deltafold.errors import CheckpointError, HubError, UsageError
from deltafold.publishing.card import card, license_of
from deltafold.publishing.push import stale


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, with a token that may write."""
    from huggingface_hub import constants

    with running() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        place = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "good")
        yield made


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def head_of(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.S)
    assert found
    return yaml.safe_load(found[1])


@pytest.mark.integration
def test_an_archive_goes_there_and_back(hub: Hub, archive: Path, pair: Any, tmp_path: Path) -> None:
    made = deltafold.push_to_hub(archive, "me/math-delta", private=True)
    held = hub.repos["me/math-delta"]["main"][1]
    assert {name: held[name] for name in tree(archive)} == tree(archive)
    assert made["url"] == f"{hub.url}/me/math-delta" and hub.private == {"me/math-delta"}
    deltafold.restore("me/math-delta", pair.base, tmp_path / "restored")
    deltafold.restore(archive, pair.base, tmp_path / "same")
    assert tree(tmp_path / "restored") == tree(tmp_path / "same")
    local, there = deltafold.inspect(archive), deltafold.inspect("me/math-delta@main")
    assert there["totals"] == local["totals"]  # the card is no part of the archive
    assert deltafold.verify("me/math-delta", base=pair.base)


@pytest.mark.integration
def test_merge_takes_archives_of_the_hub(
    hub: Hub, archive: Path, pair: Any, tmp_path: Path
) -> None:
    from deltafold.merging.choosing import merge
    from deltafold.merging.recipe import Model, Recipe

    deltafold.push_to_hub(archive, "me/math-delta")
    merge(Recipe((Model("me/math-delta"),), "task-arithmetic"), tmp_path / "there", base=pair.base)
    merge(Recipe((Model(str(archive)),), "task-arithmetic"), tmp_path / "here", base=pair.base)
    one, two = tree(tmp_path / "there"), tree(tmp_path / "here")
    assert one["model.safetensors"] == two["model.safetensors"]


@pytest.mark.integration
def test_a_base_of_the_hub_and_a_branch(hub: Hub, archive: Path, pair: Any, tmp_path: Path) -> None:
    hub.commit("org/base", "v1", tree(pair.base))
    made = deltafold.push_to_hub(archive, "me/math-delta@small")
    assert sorted(hub.repos["me/math-delta"]) == ["main", "small"]
    assert "delta.json" not in hub.repos["me/math-delta"]["main"][1]
    deltafold.restore("me/math-delta@small", "org/base@v1", tmp_path / "restored")
    deltafold.restore(f"me/math-delta@{made['commit']}", "org/base@v1", tmp_path / "again")
    assert tree(tmp_path / "restored") == tree(tmp_path / "again")
    with pytest.raises(CheckpointError, match="no such revision"):
        deltafold.inspect("me/math-delta@v9")


def test_a_second_push_leaves_nothing_of_the_first(hub: Hub, archive: Path, lossless_archive: Path):
    deltafold.push_to_hub(archive, "me/x")
    hub.repos["me/x"]["main"][1]["payload-00002-of-00002.safetensors"] = b"old"
    hub.repos["me/x"]["main"][1]["notes.md"] = b"mine"
    deltafold.push_to_hub(lossless_archive, "me/x")
    held = hub.repos["me/x"]["main"][1]
    assert set(held) - set(tree(lossless_archive)) == {".gitattributes", "README.md", "notes.md"}


def test_a_checkpoint_keeps_its_own_card(hub: Hub, pair: Any) -> None:
    (pair.finetuned / "README.md").write_text("my own")
    (pair.finetuned / "training.log").write_text("not for the hub")
    deltafold.push_to_hub(pair.finetuned, "me/model")
    held = hub.repos["me/model"]["main"][1]
    assert held["README.md"] == b"my own" and "training.log" not in held
    assert "model.safetensors" in held and "config.json" in held


def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="You may not write to other/x"):
        deltafold.push_to_hub(archive, "other/x")
    with pytest.raises(CheckpointError, match="no such repository"):
        deltafold.inspect("me/nothing")
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(HubError, match="does not accept your token"):
        deltafold.push_to_hub(archive, "me/x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="log in"):
        deltafold.push_to_hub(archive, "me/x")
    assert not hub.repos


def test_no_network_is_one_sentence(
    archive: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        deltafold.push_to_hub(archive, "me/x")
    with pytest.raises(CheckpointError, match="hub"):
        deltafold.inspect("me/x")


@pytest.mark.parametrize("name", ["x", "a/b/c", "", "a b/c", "me/x@"])
def test_a_name_that_is_none(archive: Path, name: str) -> None:
    with pytest.raises(UsageError, match="owner/name"):
        deltafold.push_to_hub(archive, name)


def test_what_cannot_be_pushed(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        deltafold.push_to_hub(tmp_path / "nothing", "me/x")
    shutil.rmtree(archive / "files", ignore_errors=True)
    next(archive.glob("payload-*")).unlink()
    with pytest.raises(deltafold.DeltafoldError, match="missing"):
        deltafold.push_to_hub(archive, "me/x")


def test_the_card_is_read_by_the_hub_and_tells_no_folders() -> None:
    record = compress_record(blocks=1) | {"base": "org/base@main", "finetuned": "/home/me/math"}
    text = card("me/math-delta", True, "org/base@main", record, "apache-2.0")
    head = head_of(text)
    assert head["base_model"] == "org/base" and head["license"] == "apache-2.0"
    assert head["library_name"] == "deltafold" and "deltafold" in head["tags"]
    assert "deltafold restore me/math-delta --base org/base@main" in text
    assert "**Bytes by role**" in text and "/home/me" not in text


def test_the_card_of_a_merge_and_of_a_local_base() -> None:
    head = head_of(card("me/all", False, "org/base", merge_record(), None))
    assert head["base_model_relation"] == "merge" and head["library_name"] == "transformers"
    text = card("me/x", True, "/home/me/base", None, None)
    assert "base_model" not in head_of(text) and "license" not in head_of(text)
    assert "--base BASE" in text and "/home/me" not in text


def test_the_license_is_that_of_the_first_card_that_has_one(tmp_path: Path) -> None:
    for name, text in {
        "a": "no front matter", "b": "---\nlicense: mit\n---\n# b", "c": "---\n: [\n---\n",
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
    folders = [str(tmp_path / name) for name in ("a", "c", "b")]
    assert license_of(*folders) == "mit" and license_of("", str(tmp_path)) is None


def test_stale_files() -> None:
    there = ["delta.json", "payload-00001-of-00002.safetensors", "files/config.json.zst", "x.md"]
    assert stale(there, ["delta.json"]) == sorted(there[1:3])
