"""Models that are odd, through every verb that makes another of one: an output, or one sentence."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import Told, deltafold
from faults.jobs import JOBS
from faults.models import Models, make_models
from safetensors.torch import load_file, save_file

from deltafold.checkpoint import Checkpoint
from deltafold.coding.sums import all_finite
from deltafold.running.record import as_json, read_record

MATRIX = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
VERBS = ("fold", "factor", "share")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("odd") / "models")


@pytest.fixture
def models(sound: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(sound.folder, tmp_path / "models")
    return replace(sound, folder=tmp_path / "models")


def put(folder: Path, name: str, tensor: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file, metadata={"format": "pt"})


def one_way_or_the_other(told: Told, out: Path) -> None:
    """An output, or one sentence and none."""
    if told.code:
        assert told.code in (1, 2), told.err
        assert told.err.count("deltafold: ") == 1
        assert not out.exists()
    else:
        assert out.is_dir()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("verb", VERBS)
def test_a_tensor_of_eight_bits(
    models: Models, tmp_path: Path, verb: str, dtype: torch.dtype
) -> None:
    before = load_file(models.base / "model.safetensors")[MATRIX]
    put(models.base, MATRIX, before.to(dtype))
    out = tmp_path / "out"
    told = deltafold(*JOBS[verb].arguments(models, out))
    one_way_or_the_other(told, out)
    if verb == "fold":
        assert told.code == 0, told.err
        with Checkpoint(out) as found:
            assert {info.dtype for info in found.tensors.values()} >= {"BF16"}


@pytest.mark.parametrize("value", [3e38, 1e30, float("nan")])
@pytest.mark.parametrize("name", [MATRIX, NORM])
@pytest.mark.parametrize("verb", [*VERBS, "compress lossy", "compress auto", "merge"])
def test_values_near_the_largest_number_and_beyond(
    models: Models, tmp_path: Path, verb: str, name: str, value: float
) -> None:
    folder = {"merge": models.other}.get(verb, models.tuned if "compress" in verb else models.base)
    put(folder, name, torch.full_like(load_file(folder / "model.safetensors")[name], value))
    out = tmp_path / "out"
    one_way_or_the_other(deltafold(*JOBS[verb].arguments(models, out)), out)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "[" * 100_000, '{"a":' * 100_000, ""])
@pytest.mark.parametrize("verb", [*VERBS, "compress exact", "compress auto"])
def test_a_config_that_holds_no_settings(
    models: Models, tmp_path: Path, verb: str, text: str
) -> None:
    (models.base / "config.json").write_text(text)
    (models.tuned / "config.json").write_text(text)
    out = tmp_path / "out"
    told = deltafold(*JOBS[verb].arguments(models, out))
    one_way_or_the_other(told, out)
    assert told.code != 0
    assert "config.json" in told.err


def test_a_setting_of_the_tokenizer_that_does_not_fit(models: Models, tmp_path: Path) -> None:
    """It shows only when a text is given to it."""
    file = models.base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "x"}))
    told = deltafold(*JOBS["fold"].arguments(models, tmp_path / "out"))
    one_way_or_the_other(told, tmp_path / "out")
    assert "The tokenizer in" in told.err
    assert "takes no text" in told.err


def test_a_name_that_is_not_utf_8(models: Models, tmp_path: Path) -> None:
    """A folder's, where files may be called so: it works, or is told in one sentence."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    for verb in ("compress exact", "restore", "merge", "fold", "export"):
        told = deltafold(*JOBS[verb].arguments(models, out), "--overwrite")
        one_way_or_the_other(told, out)
    base = models.base.rename(models.folder / os.fsdecode(b"b\xe9"))
    told = deltafold("compress", base, models.tuned, "-o", tmp_path / "x.delta", "-m", "lossless")
    one_way_or_the_other(told, tmp_path / "x.delta")


def test_a_measure_beyond_all_numbers_is_null_in_records(models: Models, tmp_path: Path) -> None:
    put(models.base, NORM, torch.full((32,), 1e30, dtype=torch.bfloat16))
    out = tmp_path / "out"
    told = deltafold(*JOBS["fold"].arguments(models, out))
    assert told.code == 0, told.err
    assert read_record(out)["kind"] == "fold"
    found = as_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": -float("inf")}})
    assert json.loads(found) == {"a": [None, 1.5, [None]], "b": {"c": None}}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_whether_all_is_finite_in_any_dtype(dtype: torch.dtype) -> None:
    values = torch.ones(3, 5).to(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    assert not all_finite(torch.tensor([1.0, float("nan")]).to(dtype))
    assert all_finite(torch.tensor([1, 2]))
