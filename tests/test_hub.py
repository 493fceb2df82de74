"""Hub ids: what is asked of the hub, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import make_pair

import deltafold
from deltafold.checkpoint import local_folder
from deltafold.errors import CheckpointError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the hub: two repositories; remembers what it was asked."""
    pair = make_pair(tmp_path / "pair")
    asked: dict[str, Any] = {"calls": []}

    def download(repo: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        asked["calls"].append((repo, revision, allow_patterns))
        return str({"org/base": pair.base, "org/math": pair.finetuned}[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_ids_and_revisions_are_passed_on(hub, tmp_path):
    deltafold.compress("org/base@main", "org/math@v1.0", tmp_path / "a.delta", file_ratio=6)
    # The fine-tune is looked at once more: it may be an adapter.
    asked = {call[:2] for call in hub["calls"]}
    assert asked == {("org/base", "main"), ("org/math", "v1.0")} and len(hub["calls"]) <= 3
    patterns = hub["calls"][0][2]
    assert "*.safetensors" in patterns and not any("bin" in pattern for pattern in patterns)


def test_no_pickle_is_ever_fetched(hub):
    local_folder("org/base")
    assert not {"*", "*.bin", "*.pt", "*.pkl"} & set(hub["calls"][0][2])


def test_a_local_folder_is_never_looked_up(hub, tmp_path):
    assert local_folder(tmp_path) == tmp_path
    assert not hub["calls"]


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "org/", "/no/such/folder", "org/name@", ""])
def test_what_is_neither_folder_nor_id_is_refused(name):
    with pytest.raises(CheckpointError, match="does not exist"):
        local_folder(name)


def test_a_hub_that_fails_is_one_sentence(hub):
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        local_folder("org/unknown")
