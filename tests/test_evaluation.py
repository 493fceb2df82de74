"""`evaluate` as a whole: the record, the models it takes, the command, the sentences."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from evaluation_models import (
    TEXT,
    VOCABULARY,
    make_gpt2,
    make_llama,
    make_tokenizer,
    nudged,
    save,
    write_rows,
)
from typer.testing import CliRunner

from deltafold.cli.evaluate import evaluate as command
from deltafold.errors import CheckpointError, DeltafoldError, MismatchError, UsageError
from deltafold.evaluation import loading
from deltafold.evaluation.evaluate import evaluate
from deltafold.evaluation.table import explanations, format_figure, grid
from deltafold.running.record import record_path, write_record

SUMS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
QUIZ = [{"question": f"{i}+1=", "choices": [str(i + 1), "no"], "answer": 0} for i in range(4)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base, its fine-tune, a candidate close to the fine-tune; two tasks and a text."""
    save(make_llama(0), tmp_path / "base", make_tokenizer())
    save(nudged(make_llama(0), 1, 0.1), tmp_path / "tuned", make_tokenizer())
    save(nudged(nudged(make_llama(0), 1, 0.1), 2, 0.02), tmp_path / "near")  # needs no tokenizer
    write_rows(tmp_path / "sums.jsonl", SUMS)
    write_rows(tmp_path / "quiz.jsonl", QUIZ)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(home: Path, **options: Any) -> dict[str, Any]:
    asked = {
        "models": [home / "near"],
        "tasks": [home / "sums.jsonl", home / "quiz.jsonl"],
        "texts": [home / "text.txt"],
        "max_length": 32,
        "device": "cpu",
    }
    return evaluate(home / "tuned", **(asked | options))


def test_the_record_holds_every_model_under_one_setting(home: Path) -> None:
    lines: list[str] = []
    record = run(home, base=home / "base", report=lines.append)
    write_record(record, home / "record.json")  # it is plain JSON without NaN
    assert (record["record_version"], record["kind"]) == (1, "evaluate")
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 0
    models = {model["role"]: model for model in record["models"]}
    assert list(models) == ["base", "fine-tune", "candidate"]
    assert [model["label"] for model in record["models"]] == ["base", "tuned", "near"]
    for role, model in models.items():
        metrics = model["metrics"]
        assert {"accuracy", "accuracy_normalised"} == set(metrics["tasks"]["quiz"])
        # The fine-tune is what the others are compared with; it has no distance of its own.
        assert ("kl_text" in metrics) == (role != "fine-tune")
        assert ("kl" in metrics["tasks"]["sums"]) == (role != "fine-tune")
        assert metrics["perplexity"]["n"] == len(TEXT) - 1
    far, near = (models[role]["metrics"] for role in ("base", "candidate"))
    assert 0 < near["kl_text"]["value"] < far["kl_text"]["value"]
    settings = record["settings"]
    assert (settings["dtype"], settings["device"], settings["max_length"]) == ("fp32", "cpu", 32)
    assert [task["kind"] for task in settings["tasks"]] == ["exact_match", "choices"]
    assert "near: sums" in lines


def test_the_fine_tune_as_a_candidate_is_its_own_twin(home: Path) -> None:
    record = run(home, models=[home / "tuned"])
    fine_tune, twin = record["models"]
    assert fine_tune["label"] != twin["label"]
    assert twin["metrics"]["kl_text"]["value"] == 0
    assert twin["metrics"]["agreement_text"]["value"] == 1
    assert twin["metrics"]["tasks"]["sums"]["kl"]["value"] == 0
    assert twin["metrics"]["perplexity"] == fine_tune["metrics"]["perplexity"]


def test_the_fine_tunes_dtype_is_used_for_all(home: Path) -> None:
    save(nudged(make_llama(0), 1, 0.1).bfloat16(), home / "tuned")
    assert run(home, tasks=[])["settings"]["dtype"] == "bf16"
    full = run(home, tasks=[], dtype="fp32")
    assert full["settings"]["dtype"] == "fp32"


def test_limit_and_defaults(home: Path) -> None:
    record = run(home, limit=2, max_length=None)
    metrics = record["models"][0]["metrics"]
    assert metrics["tasks"]["sums"]["exact_match"]["n"] == 2
    assert record["settings"]["max_length"] == 128  # the model's limit, below 512
    assert metrics["perplexity"]["n"] == 2 * 127


def test_sizes_come_from_the_record_of_a_restored_model(home: Path) -> None:
    known = {"archive_bytes": 123, "file_ratio": 9.5, "method": "lowrank"}
    write_record({"record_version": 1, "kind": "restore", **known}, record_path(home / "near"))
    entry = run(home, tasks=[])["models"][-1]
    assert {key: entry[key] for key in known} == known
    write_record({"record_version": 1, "kind": "merge", **known}, record_path(home / "near"))
    assert "archive_bytes" not in run(home, tasks=[])["models"][-1]


def test_an_archive_is_loaded_on_its_base(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = home / "tuned.delta"
    archive.mkdir()
    (archive / "delta.json").write_text("{}" * 50)  # 100 bytes

    class Manifest:
        method = "impart"
        finetuned = type("Source", (), {"total_bytes": 2500})

    def load(path: Path, base: Path, causal: bool, dtype: torch.dtype) -> Any:
        assert (path, base, causal, dtype) == (archive, home / "base", True, torch.float32)
        return nudged(make_llama(0), 1, 0.1)

    verb = ModuleType("deltafold.restoring.load")
    verb.load_archive = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deltafold.restoring.load", verb)
    monkeypatch.setattr("deltafold.evaluation.evaluate.read_manifest", lambda path: Manifest)
    entry = run(home, models=[archive], base=home / "base")["models"][-1]
    assert (entry["archive_bytes"], entry["file_ratio"], entry["method"]) == (100, 25, "impart")
    assert entry["metrics"]["kl_text"]["value"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="--base"):
        run(home, models=[archive])
    with pytest.raises(UsageError, match="the fine-tune must be an ordinary"):
        evaluate(archive, texts=[home / "text.txt"])


@pytest.mark.integration
def test_a_lossless_archive_predicts_exactly_what_the_fine_tune_does(home: Path) -> None:
    from deltafold.compressing.compress import compress

    compress(home / "base", home / "tuned", home / "tuned.delta", method="lossless")
    record = run(home, models=[home / "tuned.delta"], base=home / "base")
    _, fine_tune, restored = record["models"]
    assert restored["metrics"]["kl_text"]["value"] == 0
    assert restored["metrics"]["tasks"]["sums"]["agreement"]["value"] == 1
    assert restored["metrics"]["perplexity"] == fine_tune["metrics"]["perplexity"]
    assert restored["method"] == "lossless" and restored["archive_bytes"] > 0


def test_two_models_at_most_are_in_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    whole = loading._load_folder

    def counted(*arguments: Any) -> Any:
        alive.append(sum(each() is not None for each in made))
        model = whole(*arguments)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "_load_folder", counted)
    run(home, models=[home / "near", home / "near"], base=home / "base")
    assert alive == [0, 1, 1, 1]  # before each load: nothing, then the fine-tune alone
    assert all(each() is None for each in made)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": [], "texts": []}, "nothing to measure"),
        ({"batch_size": 0}, "--batch-size 0 is too small"),
        ({"max_length": 1}, "--max-length 1 is too small"),
        ({"max_length": 129}, "tuned takes at most 128 tokens, but the text needs 129"),
        ({"max_new_tokens": 500}, "sums.jsonl, line 4 needs 504"),
        ({"dtype": "fp23"}, "no dtype 'fp23'; did you mean 'fp32'"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"models": ["nowhere"]}, "nowhere does not exist"),
    ],
)
def test_settings_that_cannot_be_get_a_sentence(
    home: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(DeltafoldError) as caught:
        run(home, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_cannot_be_measured_get_a_sentence(home: Path) -> None:
    with pytest.raises(CheckpointError, match="near holds no tokenizer"):
        evaluate(home / "near", texts=[home / "text.txt"], device="cpu")
    small = save(make_llama(0, VOCABULARY - 20), home / "small")
    with pytest.raises(MismatchError, match=r"small has 26 vocabulary entries .* token '.'"):
        run(home, models=[small])
    (home / "near" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="holds no config"):
        run(home)
    shutil.copy(home / "base" / "config.json", home / "near" / "config.json")
    (home / "near" / "model.safetensors").write_bytes(b"oops")
    with pytest.raises(CheckpointError, match="near cannot be loaded"):
        run(home)


def test_missing_weights_are_not_measured_as_random_numbers(home: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(home / "near" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, home / "near" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"near lacks the weight model\.layers\.1\.mlp\.up"):
        run(home)


def test_a_tied_head_is_no_missing_weight(home: Path) -> None:
    save(make_gpt2(0), home / "gpt2", make_tokenizer())
    record = evaluate(home / "gpt2", texts=[home / "text.txt"], max_length=32, device="cpu")
    assert record["models"][0]["metrics"]["perplexity"]["value"] > 1


def test_sampling_defaults_of_a_folder_change_no_answer(home: Path) -> None:
    before = run(home, texts=[], models=[])
    odd = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "eos_token_id": [1, 9]}
    (home / "tuned" / "generation_config.json").write_text(json.dumps(odd))
    assert loading.end_token_ids(home / "tuned", make_tokenizer()) == [1, 9]
    odd["eos_token_id"] = [1]
    (home / "tuned" / "generation_config.json").write_text(json.dumps(odd))
    after = run(home, texts=[], models=[])
    assert after["models"][0]["metrics"] == before["models"][0]["metrics"]
    with loading.loaded("tuned", home / "tuned", None, None, "cpu") as subject:
        assert subject.model.generation_config.repetition_penalty in (None, 1.0)


def figure(value: float, stderr: float | None = None, n: int = 10) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": n}


def table_record(models: int) -> dict[str, Any]:
    shared = {
        "perplexity": figure(12.3456, 0.21),
        "tasks": {"sums": {"exact_match": figure(0.935, 0.017)}},
    }
    lm_eval = {"arc": {"acc": figure(0.25, None)}}
    rows = [{"label": "tuned", "role": "fine-tune", "metrics": shared}]
    rows += [
        {
            "label": f"c|{i}",
            "role": "candidate",
            "file_ratio": 31.96,
            "metrics": shared | {"kl_text": figure(1.5e-05, 2e-06), "lm_eval": lm_eval},
        }
        for i in range(models)
    ]
    return {"models": rows}


def test_the_table_shows_figures_as_they_are() -> None:
    record = table_record(6)
    head, first, second = grid(record)[:3]
    assert head == [
        "",
        "role",
        "file ratio",
        "perplexity",
        "text KL",
        "sums exact match",
        "arc acc",
    ]
    assert first == ["tuned", "fine-tune", "-", "12.35 ± 0.21", "-", "93.5 ± 1.7 %", "-"]
    assert second[2:] == ["32.0x", "12.35 ± 0.21", "1.5e-05 ± 2e-06", "93.5 ± 1.7 %", "0.25"]
    narrow = grid(table_record(1))  # more metrics than models: metrics become rows
    assert narrow[0] == ["", "tuned", "c|0"] and narrow[3][0] == "perplexity"
    assert format_figure(figure(0.5), "percent") == "50.0 %"
    assert (
        explanations(record)[1]
        == "perplexity: exp of the mean loss per token; lower is better (n = 10)"
    )


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(command)
    return made


def test_the_command_prints_a_table_or_the_record(home: Path) -> None:
    arguments = [str(home / "tuned"), str(home / "near"), "--task", str(home / "sums.jsonl")]
    arguments += ["--text", str(home / "text.txt"), "--max-length", "32", "--device", "cpu"]
    shown = CliRunner().invoke(app(), [*arguments, "--record", str(home / "record.json")])
    assert shown.exit_code == 0, shown.output
    assert "sums exact match" in shown.stdout and "near" in shown.stdout
    assert "perplexity: exp of the mean loss per token" in shown.stdout
    assert shown.stderr == ""
    written = json.loads((home / "record.json").read_text())

    printed = CliRunner().invoke(app(), [*arguments, "--json"])
    record = json.loads(printed.stdout)
    assert printed.stderr == ""
    assert [each["metrics"] for each in record["models"]] == [
        each["metrics"] for each in written["models"]
    ]


def test_the_commands_errors_are_for_the_app_to_show(home: Path) -> None:
    result = CliRunner().invoke(app(), [str(home / "tuned")])
    assert isinstance(result.exception, UsageError)
    assert "nothing to measure" in str(result.exception)
    nowhere = [str(home / "tuned"), "--record", str(home / "none" / "r.json")]
    result = CliRunner().invoke(app(), nowhere)
    assert "is not a folder" in str(result.exception)


def test_help_needs_no_torch() -> None:
    import subprocess

    code = "import sys, deltafold.cli.evaluate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
