"""Pairs that do not belong together, and requests that cannot be met."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PairFiles, Tensors, make_pair
from refusals import nothing_left, refused

from deltafold import compress, plan, restore
from deltafold.archive import Archive
from deltafold.errors import BudgetError, CheckpointError, MismatchError, NonFiniteError, UsageError

QUERY = "model.layers.1.self_attn.q_proj.weight"


def refuse_compress(pair: PairFiles, out: Path, kind: type, *names: str, **options: Any) -> str:
    message = refused(kind, lambda: compress(pair.base, pair.finetuned, out, **options), *names)
    nothing_left(out)
    return message


def test_other_architecture(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, config={"num_hidden_layers": 32})
    refuse_compress(pair, tmp_path / "x.delta", MismatchError, "number of blocks is 2", "32")


def test_other_model_type(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, config={"model_type": "gpt2"})
    refuse_compress(pair, tmp_path / "x.delta", MismatchError, "model type", "llama", "gpt2")


def test_no_name_in_common(tmp_path: Path) -> None:
    def rename(base: Tensors, tuned: Tensors) -> None:
        for number, name in enumerate(list(tuned)):
            tuned[f"weight{number}"] = tuned.pop(name)[..., :8].contiguous()

    pair = make_pair(tmp_path, edit=rename)
    refuse_compress(pair, tmp_path / "x.delta", MismatchError, "no tensor name in common")


def test_shape_differs(tmp_path: Path) -> None:
    def widen(base: Tensors, tuned: Tensors) -> None:
        tuned[QUERY] = torch.zeros(96, 64, dtype=torch.bfloat16)

    pair = make_pair(tmp_path, edit=widen)
    refuse_compress(pair, tmp_path / "x.delta", MismatchError, QUERY, "[64, 64]", "[96, 64]")


def test_quantised_against_float(tmp_path: Path) -> None:
    def quantise(base: Tensors, tuned: Tensors) -> None:
        tuned[QUERY] = torch.zeros(64, 64, dtype=torch.int8)

    pair = make_pair(tmp_path, edit=quantise)
    refuse_compress(pair, tmp_path / "x.delta", MismatchError, QUERY, "BF16", "I8")


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [QUERY, "model.norm.weight"])
def test_not_finite(tmp_path: Path, side: str, value: float, name: str) -> None:
    def poison(base: Tensors, tuned: Tensors) -> None:
        (base if side == "base" else tuned)[name].view(-1)[5] = value

    pair = make_pair(tmp_path, edit=poison)
    folder = getattr(pair, side)
    refuse_compress(pair, tmp_path / "x.delta", NonFiniteError, name, str(folder))


def test_not_finite_in_a_new_tensor(tmp_path: Path) -> None:
    def add(base: Tensors, tuned: Tensors) -> None:
        tuned["score.weight"] = torch.full((2, 64), float("nan"))

    pair = make_pair(tmp_path, edit=add)
    refuse_compress(pair, tmp_path / "x.delta", NonFiniteError, "score.weight", method="impart")


# --- another base ---------------------------------------------------------------------------------


def test_another_base(archive: Path, tmp_path: Path) -> None:
    other = make_pair(tmp_path / "other", seed=9).base
    out = tmp_path / "restored"
    refused(MismatchError, lambda: restore(archive, other, out), str(other), "is not the base")
    nothing_left(out)


def test_base_with_one_value_changed(archive: Path, tmp_path: Path) -> None:
    def touch(base: Tensors, tuned: Tensors) -> None:
        base[QUERY][3, 4] += 0.01

    other = make_pair(tmp_path / "other", edit=touch).base
    out = tmp_path / "restored"
    refused(MismatchError, lambda: restore(archive, other, out), QUERY, "differs", str(other))
    nothing_left(out)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_tensor_that_differs_is_named(
    archive: Path, tmp_path: Path, workers: int
) -> None:
    def touch(base: Tensors, tuned: Tensors) -> None:
        for name in ("model.layers.0.mlp.up_proj.weight", QUERY):
            base[name][0, 0] += 0.01

    other = make_pair(tmp_path / "other", edit=touch).base
    with Archive(archive) as opened:
        order = [tensor.name for tensor in opened.manifest.tensors]
    first = min(QUERY, "model.layers.0.mlp.up_proj.weight", key=order.index)
    out = tmp_path / "restored"
    refused(MismatchError, lambda: restore(archive, other, out, workers=workers), first)


def test_an_equal_tensor_still_needs_its_base(archive: Path, tmp_path: Path) -> None:
    """`skip` stores nothing, so another base would give other weights without a sign."""

    def touch(base: Tensors, tuned: Tensors) -> None:
        base["lm_head.weight"][0, 0] += 1

    other = make_pair(tmp_path / "other", edit=touch).base
    out = tmp_path / "restored"
    refused(MismatchError, lambda: restore(archive, other, out), "lm_head.weight")


def test_base_without_a_tensor(archive: Path, pair: PairFiles, tmp_path: Path) -> None:
    def remove(base: Tensors, tuned: Tensors) -> None:
        del base[QUERY]

    other = make_pair(tmp_path / "other", edit=remove).base
    out = tmp_path / "restored"
    refused(MismatchError, lambda: restore(archive, other, out), QUERY, "has no tensor")
    nothing_left(out)


def test_base_of_another_shape(archive: Path, tmp_path: Path) -> None:
    def narrow(base: Tensors, tuned: Tensors) -> None:
        base[QUERY] = torch.ones(64, 32)
        tuned[QUERY] = torch.ones(64, 32)

    other = make_pair(tmp_path / "other", edit=narrow).base
    out = tmp_path / "restored"
    refused(MismatchError, lambda: restore(archive, other, out), QUERY, "[64, 32]")
    nothing_left(out)


def test_a_wrong_base_does_not_stand_in_the_way_of_the_right_one(
    archive: Path, pair: PairFiles, tmp_path: Path
) -> None:
    other = make_pair(tmp_path / "other", seed=9).base
    out = tmp_path / "restored"
    refused(MismatchError, lambda: restore(archive, other, out))
    restore(archive, pair.base, out)
    assert (out / "model.safetensors").is_file()


# --- requests -------------------------------------------------------------------------------------


def test_unknown_method(pair: PairFiles, tmp_path: Path) -> None:
    out = tmp_path / "x.delta"
    refuse_compress(pair, out, UsageError, "'impar'", "did you mean 'impart'", method="impar")
    refused(UsageError, lambda: plan(pair.base, pair.finetuned, "lowrnk"), "'lowrank'")


def test_method_that_cannot_be_asked_for(pair: PairFiles, tmp_path: Path) -> None:
    refuse_compress(pair, tmp_path / "x.delta", UsageError, "skip", method="skip")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"betta": 0.5}, ("'betta'", "did you mean 'beta'")),
        ({"beta": 2}, ("beta", "between 0 and 0.99", "2")),
        ({"beta": "much"}, ("beta", "'much'")),
        ({"c": 0}, ("C", "between 0.01 and 10")),
        ({"value_dtype": "fp8"}, ("value_dtype", "'fp8'", "fp16 or bf16")),
        ({"seed": -1}, ("seed", "-1")),
        ({"seed": 1 << 63}, ("seed",)),
        ({"file_ratio": 8, "nominal_ratio": 32}, ("--file-ratio", "--nominal-ratio", "one of")),
        ({"file_ratio": 8, "n_bytes": 9000}, ("--file-ratio", "--bytes", "one of them")),
        ({"file_ratio": 0.5}, ("--file-ratio", "0.5")),
        ({"file_ratio": float("nan")}, ("--file-ratio", "nan")),
        ({"nominal_ratio": float("inf")}, ("--nominal-ratio", "inf")),
        ({"n_bytes": -5}, ("--bytes", "-5")),
        ({"method": "lossless", "file_ratio": 8}, ("lossless", "drop the budget")),
        ({"method": "lossless", "beta": 0.5}, ("lossless", "'beta'")),
        ({"method": "dare", "beta": "auto"}, ("beta", "dare", "auto")),
    ],
)
def test_settings_that_cannot_be(
    pair: PairFiles, tmp_path: Path, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    asked = {"method": "impart"} | options
    refuse_compress(pair, tmp_path / "x.delta", UsageError, *names, **asked)


@pytest.mark.parametrize("method", ["impart", "lowrank", "dare", "magnitude"])
def test_impossible_budget_names_one_that_works(
    pair: PairFiles, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "x.delta"
    message = refuse_compress(pair, out, BudgetError, method, method=method, n_bytes=3000)
    smallest = int(re.search(r"about ([\d,]+) bytes", message)[1].replace(",", ""))
    refuse_compress(pair, out, BudgetError, method=method, n_bytes=smallest // 2)
    record = compress(pair.base, pair.finetuned, out, method, n_bytes=smallest)
    assert record["totals"]["archive_bytes"] <= 1.01 * smallest


def test_missing_inputs(pair: PairFiles, tmp_path: Path) -> None:
    out = tmp_path / "x.delta"
    nowhere = tmp_path / "nowhere"
    refused(CheckpointError, lambda: compress(nowhere, pair.finetuned, out), str(nowhere))
    refused(CheckpointError, lambda: compress(pair.base, nowhere, out), str(nowhere))
    nothing_left(out)


def test_swapped_base_and_finetune_is_asked_about(pair: PairFiles, tmp_path: Path) -> None:
    """Only one side has a chat template. If it is meant, it works; the result restores the base."""
    out = tmp_path / "x.delta"
    message = refused(UsageError, lambda: compress(pair.finetuned, pair.base, out), "chat template")
    assert "--as-given" in message
    nothing_left(out)
    assert "chat template" in plan(pair.finetuned, pair.base)["looks_swapped"]
    compress(pair.finetuned, pair.base, out, "lossless", as_given=True)
    restore(out, pair.finetuned, tmp_path / "restored")
    restored = (tmp_path / "restored" / "model.safetensors").read_bytes()
    assert restored == (pair.base / "model.safetensors").read_bytes()


def test_plan_refuses_what_compress_refuses(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, config={"hidden_size": 128})
    refused(MismatchError, lambda: plan(pair.base, pair.finetuned), "hidden size", "64", "128")


def test_config_on_one_side_only(pair: PairFiles, tmp_path: Path) -> None:
    (pair.base / "config.json").unlink()
    compress(pair.base, pair.finetuned, tmp_path / "x.delta", "lossless")
    restore(tmp_path / "x.delta", pair.base, tmp_path / "restored")
    assert json.loads((tmp_path / "restored" / "config.json").read_text())["eos_token_id"] == 7
