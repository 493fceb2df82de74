"""Small checkpoint pairs, written straight as safetensors: no model is built.

Two blocks of width 64 under Llama's names. The deltas have a fast-decaying spectrum, as those of a
real fine-tune do, so that the low-rank codecs are used and not what they fall back to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WIDTH, MIDDLE, VOCABULARY, BLOCKS = 64, 128, 512, 2
Tensors = dict[str, torch.Tensor]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": MIDDLE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class PairFiles:
    """Two folders on disk, and the fine-tune's tensors as they were written."""

    base: Path
    finetuned: Path
    tensors: Tensors


def base_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    """Random weights under Llama's names; norms are ones."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}."
        for name, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("o", WIDTH)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, WIDTH)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (MIDDLE, WIDTH)
        shapes[f"{prefix}mlp.up_proj.weight"] = (MIDDLE, WIDTH)
        shapes[f"{prefix}mlp.down_proj.weight"] = (WIDTH, MIDDLE)
    shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    made = {n: 0.05 * torch.randn(*s, generator=generator) for n, s in shapes.items()}
    for block in range(BLOCKS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{block}.{norm}.weight"] = torch.ones(WIDTH)
    made["model.norm.weight"] = torch.ones(WIDTH)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def decaying_delta(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """An o x i delta whose singular values fall by a third each; entries of about 0.01."""
    rank = 12
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, shape[1], generator=generator)
    return 0.01 * (left * 0.67 ** torch.arange(rank)) @ right


def tuned_tensors(base: Tensors, dtype: torch.dtype | None = None, seed: int = 1) -> Tensors:
    """A fine-tune of `base`: matrices move by a decaying delta, one norm changes, k_proj stays.

    The embedding changes in a few rows, the head not at all.
    """
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in base.items():
        moved = tensor.float()
        if name == "model.embed_tokens.weight":
            moved[3:9] += decaying_delta((6, WIDTH), generator)
        elif tensor.dim() == 2 and "k_proj" not in name and name != "lm_head.weight":
            moved += decaying_delta(tuple(tensor.shape), generator)
        elif name == "model.norm.weight":
            moved += 0.1 * torch.randn(WIDTH, generator=generator)
        tuned[name] = moved.to(dtype or tensor.dtype)
    return tuned


def write_checkpoint(
    folder: Path, tensors: Tensors, shards: int = 1, config: dict[str, object] | None = None
) -> Path:
    """A Hugging Face folder: one file, or `shards` files and an index; config and a tokenizer."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        step = -(-len(names) // shards)
        files = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[number * step : (number + 1) * step]}
            save_file(part, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {}), indent=2))
    words = {f"token{number}": number for number in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    return folder


def make_pair(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tuned_dtype: torch.dtype | None = None,
    shards: int = 1,
    seed: int = 0,
    edit: Callable[[Tensors, Tensors], None] | None = None,
    config: dict[str, object] | None = None,
) -> PairFiles:
    """Write `base/` and `finetuned/` under `folder`.

    `edit(base, tuned)` may change both before they are written; `config` adds to the fine-tune's.
    Of the side files one is the same on both sides, one differs, one is only in the fine-tune.
    """
    base = base_tensors(dtype, seed)
    tuned = tuned_tensors(base, tuned_dtype, seed + 1)
    if edit:
        edit(base, tuned)
    finetuned = write_checkpoint(
        folder / "finetuned", tuned, shards, {"eos_token_id": 7} | (config or {})
    )
    (finetuned / "chat_template.jinja").write_text("{{ messages[0].content }}\n" * 3)
    return PairFiles(write_checkpoint(folder / "base", base, shards), finetuned, tuned)


def read_checkpoint(folder: Path) -> Tensors:
    """All tensors of a folder, through the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bits(a: Tensors, b: Tensors) -> bool:
    """Same names, dtypes, shapes and bits."""

    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and raw(a[n]) == raw(b[n]) for n in a
    )


def tree_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by relative path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
