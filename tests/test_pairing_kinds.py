"""What users hold as base or fine-tune: adapters, archives, GGUF files; what runs say of a pair."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    Tensors,
    base_tensors,
    make_pair,
    read_checkpoint,
    same_bits,
    tuned_tensors,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from deltafold import compress, plan, restore
from deltafold.checkpoint import cache_root, open_checkpoint
from deltafold.cli.show import say_sides
from deltafold.errors import BudgetError, CheckpointError, MismatchError, UsageError

# --- adapters -------------------------------------------------------------------------------------

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "plain": (LORA, torch.float32),
    "of a base in bf16": (LORA, torch.bfloat16),
    "rank-stabilised": (LORA | {"use_rslora": True}, torch.float32),
    "ranks and scales by module": (
        LORA | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        torch.float32,
    ),
    "embedding": (LORA | {"target_modules": ["embed_tokens", "down_proj"]}, torch.float32),
    "a module given whole": (LORA | {"modules_to_save": ["lm_head"]}, torch.float32),
}


def adapter_of(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> tuple[Path, Path, Path]:
    """A base, an adapter as PEFT saves it, and the model that PEFT makes of both."""
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    plain = AutoConfig.for_model("llama", **sizes, **heads)
    AutoModelForCausalLM.from_config(plain, dtype=dtype).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight += 0.01
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "base", folder / "adapter", folder / "merged"


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_taken_as_the_model_it_makes(tmp_path: Path, kind: str) -> None:
    base, adapter, merged = adapter_of(tmp_path, *KINDS[kind])
    record = compress(base, adapter, tmp_path / "a.delta", "lossless")
    restore(tmp_path / "a.delta", base, tmp_path / "r")
    assert same_bits(read_checkpoint(tmp_path / "r"), read_checkpoint(merged))
    assert "adapter" in record["finetuned"]
    assert not list((cache_root() / "merged").glob("*"))


@pytest.mark.integration
def test_an_adapters_file_and_a_dry_run(tmp_path: Path) -> None:
    base, adapter, merged = adapter_of(tmp_path, LORA, torch.float32)
    assert plan(base, adapter)["only_in_finetuned"] == []
    compress(base, adapter / "adapter_model.safetensors", tmp_path / "a.delta", file_ratio=3)
    restore(tmp_path / "a.delta", base, tmp_path / "r")
    restored, wanted = read_checkpoint(tmp_path / "r"), read_checkpoint(merged)
    assert {n: t.shape for n, t in restored.items()} == {n: t.shape for n, t in wanted.items()}


def plain_adapter(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {f"{QUERY}.lora_A.weight": torch.ones(2, 64), f"{QUERY}.lora_B.weight": torch.ones(64, 2)}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (FACTORS, {"use_dora": True}, "use_dora"),
        (FACTORS, {"peft_type": "IA3"}, "IA3"),
        ({n.replace("q_proj", "x"): t for n, t in FACTORS.items()}, {}, "no tensor model.layers.0"),
        (dict(list(FACTORS.items())[:1]), {}, "lacks the partner"),
        (FACTORS | {f"{QUERY}.lora_magnitude_vector": torch.ones(64)}, {}, "magnitude"),
    ],
)
def test_an_adapter_that_is_not_merged_here(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any], words: str
) -> None:
    base = write_checkpoint(tmp_path / "base", base_tensors())
    adapter = plain_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(MismatchError, match=words):
        compress(base, adapter, tmp_path / "x.delta")
    assert not (tmp_path / "x.delta").exists()


def test_what_lies_in_folders_of_the_base_keeps_its_place(tmp_path: Path) -> None:
    """A pooling module's config and a dense module's weights: neither takes the place of the model's."""
    base, adapter, merged = adapter_of(tmp_path, LORA, torch.float32)
    for name, data in (("1_Pooling/config.json", b"{}"), ("2_Dense/config.json", b'{"in": 4}')):
        (base / name).parent.mkdir()
        (base / name).write_bytes(data)
    dense = base / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": torch.eye(4)}, dense, metadata={"format": "pt"})
    record = compress(base, adapter, tmp_path / "a.delta", "lossless")
    restore(tmp_path / "a.delta", base, tmp_path / "out")
    assert record["left_out"] == []
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["model_type"] == json.loads((base / "config.json").read_text())["model_type"]
    assert same_bits(read_checkpoint(tmp_path / "out"), read_checkpoint(merged))


def test_a_folder_with_an_adapter_beside_whole_weights_is_a_model(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    (pair.finetuned / "adapter_config.json").write_text("{}")
    save_file(FACTORS, pair.finetuned / "adapter_model.safetensors")
    compress(pair.base, pair.finetuned, tmp_path / "x.delta", "lossless")
    restore(tmp_path / "x.delta", pair.base, tmp_path / "r")
    assert same_bits(read_checkpoint(tmp_path / "r"), pair.tensors)


# --- other kinds ----------------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_told_by_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    archive = tmp_path / "x.delta"
    compress(pair.base, pair.finetuned, archive, "lossless")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(64))
    folder = tmp_path / "gguf"
    folder.mkdir()
    shutil.copy(gguf, folder)
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"PK\x03\x04" + bytes(64))
    adapter = plain_adapter(tmp_path / "adapter", FACTORS)
    for given, words in (
        (archive, "is an archive.*restore"),
        (gguf, "(?i)gguf"),
        (folder, "(?i)gguf"),
        (pickle, "pickle"),
        (adapter, "LoRA adapter"),
        (adapter / "adapter_model.safetensors", "LoRA adapter"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(given)
        with pytest.raises(CheckpointError, match=words):
            compress(given, pair.finetuned, tmp_path / "y.delta")


def test_a_header_as_long_as_a_pickle_begins_is_a_header(tmp_path: Path) -> None:
    """640 is 0x80 0x02 in a file: the two bytes that a pickle begins with."""
    tensor = torch.arange(8, dtype=torch.uint8)
    file = tmp_path / "model.safetensors"
    for length in range(600):
        save_file({"x": tensor}, file, metadata={"pad": "." * length})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    with open_checkpoint(tmp_path) as opened:
        assert torch.equal(opened.tensor("x"), tensor)


# --- what cannot be a small difference ------------------------------------------------------------


def test_the_record_says_what_has_no_counterpart(tmp_path: Path) -> None:
    def add(base: Tensors, tuned: Tensors) -> None:
        tuned["vision.patches.weight"] = torch.randn(300, 64)

    pair = make_pair(tmp_path, edit=add)
    record = compress(pair.base, pair.finetuned, tmp_path / "x.delta", "lossless")
    told = record["pairing"]["only_in_finetuned"]
    assert told["tensors"] == 1 and told["largest"] == ["vision.patches.weight"]
    assert told["bytes"] == 300 * 64 * 4 and 0 < told["share"] < 1
    with pytest.raises(BudgetError, match=r"vision\.patches\.weight\) are only in the fine-tune"):
        compress(pair.base, pair.finetuned, tmp_path / "y.delta", calibration="none")


@pytest.mark.parametrize("method", ["auto", "svd-quant"])
def test_a_budget_missed_where_nothing_is_approximated_is_an_error(
    tmp_path: Path, method: str
) -> None:
    torch.manual_seed(0)
    base = {f"layers.{n}.norm.weight": torch.randn(4096) for n in range(4)}
    tuned = {name: t + torch.randn(4096) for name, t in base.items()}
    folders = (write_checkpoint(tmp_path / "a", base), write_checkpoint(tmp_path / "b", tuned))
    with pytest.raises(BudgetError, match="cannot be met"):
        compress(*folders, tmp_path / "x.delta", method, calibration="none")


def test_fp8_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    base = base_tensors()
    tuned = {
        name: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t
        for name, t in tuned_tensors(base).items()
    }
    folders = (write_checkpoint(tmp_path / "a", base), write_checkpoint(tmp_path / "b", tuned))
    with pytest.raises(BudgetError, match=r"FP8.*--method lossless"):
        compress(*folders, tmp_path / "x.delta", calibration="none")
    compress(*folders, tmp_path / "x.delta", "lossless")
    restore(tmp_path / "x.delta", folders[0], tmp_path / "r")
    restored = load_file(tmp_path / "r" / "model.safetensors")
    assert all(
        torch.equal(restored[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tuned.items()
    )


# --- base and fine-tune swapped -------------------------------------------------------------------


def bare_pair(folder: Path) -> tuple[Path, Path]:
    """A pair in which nothing but the values tells the sides apart."""
    base = base_tensors()
    return (
        write_checkpoint(folder / "origin", base),
        write_checkpoint(folder / "math", tuned_tensors(base)),
    )


def with_card(base: Path, tuned: Path) -> None:
    (tuned / "README.md").write_text("---\nbase_model:\n- org/origin\n---\n")


def with_path(base: Path, tuned: Path) -> None:
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"_name_or_path": str(base)}))


def with_template(base: Path, tuned: Path) -> None:
    (tuned / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))


@pytest.mark.parametrize("sign", [with_card, with_path, with_template])
def test_a_pair_that_looks_swapped_is_asked_about(tmp_path: Path, sign: Any) -> None:
    base, tuned = bare_pair(tmp_path)
    compress(tuned, base, tmp_path / "a.delta", "lossless")  # nothing tells
    sign(base, tuned)
    compress(base, tuned, tmp_path / "b.delta", "lossless")
    with pytest.raises(UsageError, match=r"look swapped.*--as-given"):
        compress(tuned, base, tmp_path / "c.delta", "lossless")
    compress(tuned, base, tmp_path / "c.delta", "lossless", as_given=True)


def test_an_archive_made_the_other_way_is_not_overwritten_unasked(tmp_path: Path) -> None:
    base, tuned = bare_pair(tmp_path)
    compress(base, tuned, tmp_path / "a.delta", "lossless")
    with pytest.raises(UsageError, match="was made with"):
        compress(tuned, base, tmp_path / "a.delta", "lossless", overwrite=True)
    compress(base, tuned, tmp_path / "a.delta", "lossless", overwrite=True)


def test_the_first_line_names_both_sides_and_their_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair(tmp_path)
    say_sides(str(pair.base), str(pair.finetuned))
    line = capsys.readouterr().out
    assert re.fullmatch(
        rf"base {pair.base} \(\d+ kB\) -> fine-tune {pair.finetuned} \(\d+ kB\)\n", line
    )
