"""`deltafold share` end to end on tiny models: the file, resuming, several processes, bad input."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from folding_models import write_deep, write_text
from processes import Processes
from sharing_models import IDS
from tiny_models import FAMILIES

import deltafold
from deltafold.errors import CheckpointError, MismatchError, UsageError
from deltafold.sharing.share import share

pytestmark = pytest.mark.integration
MOE = ("mixtral", "qwen2 moe")
TINY: dict[str, Any] = {
    "shared": 1, "rank": 4, "protect": (0, -1), "max_tokens": 16, "batch": 2, "check_steps": 2,
    "rate": 3e-3,
}  # fmt: skip


UNTIL_KILLED = """
import json, os, signal, sys
import torch
from deltafold.sharing.share import share
torch.set_num_threads(1)
def watch(step):
    if step.stage == "train" and step.done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
base, output, options = sys.argv[1:]
share(base, output, progress=watch, **json.loads(options))
"""


def model_and_text(folder: Path, family: str = "llama") -> tuple[Path, Path]:
    return write_deep(folder / "base", family), write_text(folder / "text.txt", 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_shared_trained_and_loads(tmp_path: Path, family: str) -> None:
    base, text = model_and_text(tmp_path, family)
    matrices = "attention" if family in MOE else "both"
    out = tmp_path / "shared"
    record = share(base, out, matrices=matrices, calibration=text, steps=4, **TINY)
    model = deltafold.load(out)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    header = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    itemsize = 2
    assert record["weight_bytes"] - header == record["parameters"] * itemsize
    assert record["quality"]["trained"]["kl"] >= 0
    assert json.loads((tmp_path / "shared.record.json").read_text())["kind"] == "share"
    assert not (tmp_path / "shared.partial").exists()
    again = share(base, tmp_path / "again", matrices=matrices, calibration=text, steps=4, **TINY)
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    assert again["curve"] == record["curve"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["deltallm", "no-anchor", "drop-mlp", "tie"])
def test_methods_are_written_and_dense_is_the_same_model(
    tmp_path: Path, method: str, family: str
) -> None:
    base, text = model_and_text(tmp_path, family)
    options = TINY | {"shared": 1, "rank": 20, "row_scale": True}
    record = share(base, tmp_path / "shared", method, calibration=text, steps=2, **options)
    share(base, tmp_path / "dense", method, calibration=text, steps=2, dense=True, **options)
    from transformers import AutoModelForCausalLM

    shared = deltafold.load(tmp_path / "shared", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    expected = shared(IDS).logits
    difference = (dense(IDS).logits - expected).detach().abs().max()
    assert difference < 0.03 * expected.detach().abs().max()
    assert not (tmp_path / "dense" / "modeling_deltafold.py").exists()
    assert record["parameters"] <= record["base_parameters"]


def test_all_weights_can_be_trained(tmp_path: Path) -> None:
    base, text = model_and_text(tmp_path)
    options = TINY | {"rank": 1, "rate": 3e-4, "kl_share": 1.0, "row_scale": False}
    record = share(base, tmp_path / "shared", calibration=text, steps=20, tune="all", **options)
    kls = [row["kl"] for row in record["exams"]]
    assert min(kls) < kls[0]
    assert record["trained_parameters"] == record["parameters"]
    after = deltafold.load(tmp_path / "shared").model.layers[0].mlp.up_proj.weight
    from safetensors.torch import load_file

    stored = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(after, stored)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputing_changes_nothing_and_bf16_little(tmp_path: Path, family: str) -> None:
    base, text = model_and_text(tmp_path, family)
    options = TINY | {"calibration": text, "steps": 6, "rank": 2, "replace_until": 0.0}
    plain = share(base, tmp_path / "plain", **options)
    again = share(base, tmp_path / "again", recompute=True, **options)
    half = share(base, tmp_path / "half", bf16=True, **options)
    assert [row["loss"] for row in again["curve"]] == pytest.approx(
        [row["loss"] for row in plain["curve"]], rel=1e-5
    )
    losses = [row["loss"] for row in half["curve"]]
    assert losses == pytest.approx([row["loss"] for row in plain["curve"]], rel=0.05)
    assert losses != [row["loss"] for row in plain["curve"]]


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, processes: Processes) -> None:
    base, text = model_and_text(tmp_path)
    options = TINY | {"calibration": text, "steps": 8}
    share(base, tmp_path / "whole", **options)

    # Not a fork of this process: torch forbids backward passes in those of a process that has
    # run one, once it knows another device (`pretend_gpu.py`).
    wish = json.dumps(options | {"calibration": str(text)})
    killed = processes.run("-c", UNTIL_KILLED, base, tmp_path / "broken", wish)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "broken.partial" / "training.safetensors").is_file()
    done = []
    share(base, tmp_path / "broken", progress=lambda step: done.append(step), **options)
    steps = [step.done for step in done if step.stage == "train"]
    assert steps == [5, 6, 7, 8]
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


@pytest.mark.parametrize("start", ["svd", "activation", "fit", "zero"])
@pytest.mark.parametrize("align", [False, True])
def test_starts_without_training(tmp_path: Path, start: str, align: bool) -> None:
    base, text = model_and_text(tmp_path)
    options = TINY | {"rank": 16}
    record = share(base, tmp_path / "shared", start=start, align=align, text=text, **options)
    assert set(record["quality"]) == {"whole", "start"}
    assert record["quality"]["start"]["kl"] > 0
    assert "curve" not in record


def test_searched_placement_and_searched_numbers(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    base, text = model_and_text(tmp_path)
    record = share(
        base, tmp_path / "shared", calibration=text, steps=4, trials=3, trial_steps=2,
        placement="searched", **TINY,
    )  # fmt: skip
    cheapest = min(record["costs"], key=lambda row: row["kl"])["block"]
    assert [place["block"] for place in record["places"]] == [cheapest]
    assert len(record["search"]) == 3
    best = min(record["search"], key=lambda row: row["kl"])
    assert record["numbers"]["rate"] == best["rate"]
    assert record["search"][0]["rate"] == TINY["rate"]


def test_two_processes_train_as_one_does(tmp_path: Path, processes: Processes) -> None:
    base, text = model_and_text(tmp_path)
    arguments = [
        "share", base, "-o", tmp_path / "two", "--shared", 1, "--rank", 4, "--protect", "0,-1",
        "--max-tokens", 16, "--batch", 2, "--check-steps", 2, "--rate", "3e-3", "--calibration", text,
        "--steps", 4,
    ]  # fmt: skip
    made = processes.run(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "-m", "deltafold", *arguments, CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    assert made.stdout.count("parameters") == 1
    two = json.loads((tmp_path / "two.record.json").read_text())
    one = share(base, tmp_path / "one", calibration=text, steps=4, **TINY)
    assert two["processes"] == 2
    for mine, theirs in zip(one["curve"], two["curve"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
    ours, theirs = (deltafold.load(tmp_path / name) for name in ("one", "two"))
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-2, rtol=2e-2)


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    base, text = model_and_text(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for changes, error, words in (
        ({"start": "svdd"}, UsageError, "did you mean 'svd'"),
        ({"calibration": text}, UsageError, "give --steps"),
        ({"trials": 3}, UsageError, "give --steps"),
        ({"steps": 2, "rate": 3.0}, UsageError, "rate must be between 0 and 1"),
        ({"steps": 2, "tune": "some"}, UsageError, "no tune"),
        ({"steps": 2, "replace_stagger": 1.0}, UsageError, "stagger"),
        ({"matrices": "attention", "align": True}, UsageError, "leave out --align"),
        ({"steps": 2, "calibration": tmp_path / "none"}, Exception, "cannot be read"),
        ({"steps": 2, "calibration": empty}, Exception, "no text"),
    ):
        with pytest.raises(error, match=words):
            share(base, tmp_path / "out", **(TINY | changes))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
    share(base, tmp_path / "shared", **TINY)
    with pytest.raises(MismatchError, match="shared or factored already"):
        share(tmp_path / "shared", tmp_path / "out", **TINY)
    with pytest.raises(UsageError, match="exists"):
        share(base, tmp_path / "shared", **TINY)
    with pytest.raises(CheckpointError, match="does not exist"):
        share(tmp_path / "nothing", tmp_path / "out", **TINY)
    write_deep(tmp_path / "moe", "mixtral")
    with pytest.raises(MismatchError, match="--matrices attention"):
        share(tmp_path / "moe", tmp_path / "out", **TINY)


def test_former_names_go_on_working_and_say_so(tmp_path: Path, deltafold: Run) -> None:
    base, text = model_and_text(tmp_path)
    with pytest.warns(FutureWarning) as said:
        former = share(
            base,
            tmp_path / "a",
            train=text,
            steps=2,
            scale=True,
            measure=text,
            texts=[text],
            **TINY,
        )
    words = {str(each.message).split(" now")[0] for each in said}
    assert words == {
        "train is called calibration", "scale is called row_scale", "measure is called text",
        "texts is called text",
    }  # fmt: skip
    today = share(
        base, tmp_path / "b", calibration=text, steps=2, row_scale=True, text=[text] * 2, **TINY
    )
    assert former["quality"] == today["quality"] and former["settings"] == today["settings"]
    line = [
        "share",
        base,
        "-o",
        tmp_path / "c",
        "--shared",
        1,
        "--rank",
        4,
        "--protect",
        "0",
        "--dry-run",
    ]
    made = deltafold(
        *line, "--no-scale", "--search", 2, "--search-steps", 3, "--steps", 9, "--json"
    )
    assert made.returncode == 0, made.stderr
    settings = json.loads(made.stdout)["settings"]
    assert (settings["trials"], settings["trial_steps"], settings["row_scale"]) == (2, 3, False)
    assert made.stderr.count("goes with the next release") == 3


def test_the_command_says_what_it_did(tmp_path: Path, deltafold: Run) -> None:
    base, text = model_and_text(tmp_path)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "one ", "answer": "two"}\n{"prompt": "3 ", "answer": "4"}\n')
    made = deltafold(
        "share", base, "-o", tmp_path / "shared", "--shared", 1, "--rank", 4, "--protect", "0,-1",
        "--calibration", text, "--steps", 2, "--max-tokens", 16, "--batch", 2, "--task", task,
        "--text", text,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "1 of 5 blocks share" not in made.stdout
    for words in ("blocks 3 (of 2)" if "3 (of 2)" in made.stdout else "(of ", "parameters",
                  "trained for 2 steps", "tokens/s", "record in"):  # fmt: skip
        assert words in made.stdout
    record = json.loads((tmp_path / "shared.record.json").read_text())
    assert [row["label"] for row in record["scores"]] == ["whole", "shared"]
    made = deltafold("share", base, "-o", tmp_path / "x", "--parameters", "0.1", "--dry-run")
    assert made.returncode == 2
    assert "ask for a larger share" in made.stderr or "protect fewer" in made.stderr
