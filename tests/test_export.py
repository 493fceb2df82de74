"""Adapters of archives, over every family: PEFT loads them in silence, and answers as was said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_checkpoint, tree_hashes
from refusals import nothing_left, refused
from tiny_models import FAMILIES, write_family

from deltafold import compress, export, load, restore
from deltafold.errors import BudgetError, MismatchError, UsageError

pytestmark = pytest.mark.integration
MOE = ("mixtral", "qwen2 moe")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, Path]:
    """Name, base, a lossless archive, a low-rank archive."""
    folder = tmp_path_factory.mktemp("family")
    base, finetuned = write_family(folder, request.param)
    compress(base, finetuned, folder / "exact.delta", "lossless")
    compress(base, finetuned, folder / "lowrank.delta", "lowrank", file_ratio=3)
    return request.param, base, folder / "exact.delta", folder / "lowrank.delta"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and lossless archive of one family."""
    folder = tmp_path_factory.mktemp("llama")
    base, finetuned = write_family(folder, "llama")
    compress(base, finetuned, folder / "exact.delta", "lossless")
    return base, folder / "exact.delta"


def logits(model: Any, **more: Any) -> torch.Tensor:
    tokens = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return model(tokens, **more).logits.float()


def open_peft(base: Path, adapter: Path) -> Any:
    """Base and adapter in fp32, loaded by PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_peft_answers_as_the_restored_model(family: Any, tmp_path: Path) -> None:
    """Full rank: all that is lost is what the record says, and what is left out is named."""
    name, base, exact, _ = family
    record = export(exact, tmp_path / "adapter", base=base, energy=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = open_peft(base, tmp_path / "adapter")
    said = [str(w.message) for w in caught if "peft" in str(w.filename)]
    # GPT-2's head is an ordinary layer among transposed ones: PEFT has one switch for both.
    assert not [text for text in said if name != "gpt2" or "fan_in_fan_out" not in text], said
    restored = load(exact, base=base, dtype=torch.float32)
    before = type(restored).from_pretrained(base, dtype=torch.float32).eval()
    here, there, plain = logits(model), logits(restored), logits(before)
    left_out = [row for row in record["tensors"] if row["how"] == "none"]
    assert record["relative_error_of_pairs"] < 0.005  # rounding to bf16
    if not left_out:
        assert record["relative_error"] < 0.005
        assert distance(here, there) < 0.02 * distance(plain, there)
    else:
        assert all(row["why"] for row in left_out)
        assert {row["role"] for row in left_out} <= {"expert", "router", "bias"}, left_out
        assert distance(here, there) < distance(plain, there)
    assert bool([r for r in left_out if r["role"] in ("expert", "router")]) == (name in MOE)


def test_stored_factors_go_as_they_are(family: Any, tmp_path: Path) -> None:
    _, base, _, lowrank = family
    record = export(lowrank, tmp_path / "adapter", base=base)
    rows = {row["name"]: row for row in record["tensors"]}
    entries = json.loads((lowrank / "delta.json").read_text())["tensors"]
    stored = {e["name"]: e["pieces"][0]["settings"]["rank"] for e in entries
              if len(e.get("pieces", ())) == 1 and e["pieces"][0]["codec"] == "lowrank"}  # fmt: skip
    went = {name: rank for name, rank in stored.items() if rows[name]["how"] == "pair"}
    assert went
    for name, rank in went.items():
        assert (rows[name]["from"], rows[name]["rank"]) == ("stored", rank)
        assert rows[name]["relative_error"] < 0.005


def test_a_changed_base_takes_the_rest(family: Any, tmp_path: Path) -> None:
    """Folded, nothing is lost: experts, norms, biases and embeddings are the base's own."""
    _, base, exact, _ = family
    record = export(exact, tmp_path / "adapter", base=base, energy=1.0, rest="fold")
    assert not [row for row in record["tensors"] if row["how"] == "none"]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "adapter/base")
    model = open_peft(tmp_path / "adapter/base", tmp_path / "adapter")
    restored = load(exact, base=base, dtype=torch.float32)
    plain = type(restored).from_pretrained(base, dtype=torch.float32).eval()
    far = distance(logits(plain), logits(restored))
    assert distance(logits(model), logits(restored)) < 0.02 * far


def test_for_vllm(family: Any, tmp_path: Path) -> None:
    _, base, exact, _ = family
    record = export(exact, tmp_path / "adapter", base=base, rank=4, runtime="vllm")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "modules_to_save" not in config and record["vllm_max_lora_rank"] == 8
    names = list(read_checkpoint(tmp_path / "adapter"))
    assert names and all(".lora_" in name for name in names)


def test_same_bytes_and_never_over_budget(llama: Any, tmp_path: Path) -> None:
    base, exact = llama
    whole = export(exact, tmp_path / "whole", base=base, energy=1.0)["adapter_bytes"]
    for workers in (1, 3):
        export(exact, tmp_path / f"at{workers}", base=base, n_bytes=whole // 2, workers=workers)
    assert tree_hashes(tmp_path / "at1") == tree_hashes(tmp_path / "at3")
    taken = sum(f.stat().st_size for f in (tmp_path / "at1").iterdir())
    assert whole // 3 < taken <= whole // 2
    refused(
        BudgetError,
        lambda: export(exact, tmp_path / "none", base=base, n_bytes=900),
        "--bytes", "at least",
    )  # fmt: skip
    nothing_left(tmp_path / "none")


def test_left_out_as_asked(llama: Any, tmp_path: Path) -> None:
    base, exact = llama
    record = export(exact, tmp_path / "adapter", base=base, rank=64, rest="drop")
    dropped = {row["role"] for row in record["tensors"] if row["how"] == "none"}
    assert dropped == {"embedding", "head", "norm"}
    assert record["relative_error"] > 10 * record["relative_error_of_pairs"]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "embed_tokens" not in config["target_modules"] and "modules_to_save" not in config


def test_bad_wishes(llama: Any, tmp_path: Path) -> None:
    base, exact = llama
    out = tmp_path / "x"
    wishes: list[tuple[Any, dict[str, Any], str]] = [
        (UsageError, {"to": "pefft"}, "did you mean 'peft'"),
        (UsageError, {"runtime": "vlllm"}, "did you mean 'vllm'"),
        (UsageError, {"rest": "folded"}, "did you mean 'fold'"),
        (UsageError, {"rank": 4, "energy": 0.9}, "--rank"),
        (UsageError, {"rank": 600, "runtime": "vllm"}, "512"),
        (UsageError, {"to": "gguf-lora", "rest": "fold"}, "--rest"),
        (UsageError, {"calibration": "self"}, "--calibration self"),
    ]
    for kind, wish, names in wishes:
        refused(kind, lambda w=wish: export(exact, out, **{"base": base, **w}), names)
        nothing_left(out)
    refused(MismatchError, lambda: export(exact, out, base=write_other(tmp_path)), "base")
    nothing_left(out)


def write_other(folder: Path) -> Path:
    """A base of the same shapes with other weights."""
    from tiny_models import build, tune

    model = build("llama")
    tune(model, seed=5)
    model.save_pretrained(folder / "other")
    return folder / "other"


def test_new_vocabulary_rows_stay_behind(tmp_path: Path) -> None:
    """The base has no rows for new tokens: said, and all else is as it would be."""
    from tiny_models import build, tune

    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    tune(model)
    model.resize_token_embeddings(168)
    model.save_pretrained(tmp_path / "finetuned")
    compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "x.delta", "lossless")
    record = export(tmp_path / "x.delta", tmp_path / "adapter", base=tmp_path / "base", rank=64)
    why = {row["name"]: row["why"] for row in record["tensors"] if row["why"]}
    assert "8 new vocabulary rows" in why["model.embed_tokens.weight"]
    model = open_peft(tmp_path / "base", tmp_path / "adapter")
    restore(tmp_path / "x.delta", tmp_path / "base", tmp_path / "restored")
    restored = type(model.base_model.model).from_pretrained(
        tmp_path / "restored", dtype=torch.float32
    )
    assert distance(logits(model), logits(restored)[..., :160]) < 0.005
