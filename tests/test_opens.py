"""Every checkpoint that is written is opened once without weights, before it gets its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folding_models import write_deep
from safetensors.torch import load_file, save_file

from deltafold import fold, merge
from deltafold.calibration.opens import check_opens, open_bare
from deltafold.errors import CheckpointError
from deltafold.merging.recipe import Model, Recipe

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("whole") / request.param, request.param)


def changed(folder: Path, target: Path, **more: torch.Tensor | None) -> Path:
    """The folder with some tensors replaced, added or (None) gone."""
    target.mkdir()
    state = load_file(folder / "model.safetensors") | more
    save_file(
        {name: each for name, each in state.items() if each is not None},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("accelerated", [True, False])
def test_faults_are_named(
    folder: Path, tmp_path: Path, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accelerate transformers loads without weights; without it the rules are applied."""
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: accelerated)
    assert open_bare(folder).to_record() == {"opened": True, "why_not": None, "problems": []}
    state = load_file(folder / "model.safetensors")
    name = next(each for each in state if "norm" in each or "ln_" in each)
    for label, more, words in [
        ("lacking", {name: None}, f"{name} is missing"),
        ("wide", {name: torch.ones(3)}, "is [3] and should be [64]"),
        ("more", {"other.weight": torch.ones(3)}, "other.weight belongs to no part"),
    ]:
        made = changed(folder, tmp_path / label, **more)
        (found,) = open_bare(made).problems
        assert words in found
        with pytest.raises(CheckpointError, match="The model made from mine does not open"):
            check_opens(made, "mine", folder)
        assert check_opens(made, "mine", made)["problems"] == [found], "as it was before"


def test_what_transformers_does_not_know_is_said(folder: Path, tmp_path: Path) -> None:
    made = changed(folder, tmp_path / "own")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"model_type": "own-kind"}))
    found = check_opens(made, "mine")
    assert not found["opened"] and "own-kind" in found["why_not"]
    (made / "config.json").write_text(json.dumps(config | {"architectures": ["OwnModel"]}))
    assert "OwnModel" in check_opens(made, "mine")["why_not"]
    (made / "config.json").unlink()
    assert check_opens(made, "mine")["why_not"] == "there is no config.json"


def test_a_config_that_was_read_before_must_be_read_again(folder: Path, tmp_path: Path) -> None:
    made = changed(folder, tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"vocab_size": "many"}))
    assert not check_opens(made, "mine", made)["opened"], "as it was before"
    with pytest.raises(CheckpointError, match=r"mine does not open: .* cannot be read"):
        check_opens(made, "mine", folder)


def test_verbs_say_that_it_opens(folder: Path, tmp_path: Path) -> None:
    record = fold(folder, tmp_path / "folded", "random", blocks=1, calibration="none")
    assert record["checked"]["opened"] and record["checked"]["run"]
    recipe = Recipe((Model(str(folder)),))
    assert merge(recipe, tmp_path / "merged", base=folder)["checked"]["opened"]
