"""Tiny models of real architectures, built and saved through transformers: two blocks, width 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import decaying_delta

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# name -> (model type, settings beside SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"sliding_window": 32, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2 moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 64}),
}


def build(family: str) -> Any:
    """A randomly initialised model of a family in bf16; the same weights each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, more = FAMILIES[family]
    sizes = {} if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, **(sizes | {"vocab_size": 160} | more))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def tune(model: Any, seed: int = 1) -> None:
    """Move every parameter as a fine-tune would: matrices by a low-rank delta, the rest a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
                continue
            for matrix in parameter.view(-1, *parameter.shape[-2:]):
                matrix += decaying_delta(tuple(matrix.shape), generator)


def write_family(folder: Path, family: str) -> tuple[Path, Path]:
    """`base/` and `finetuned/` of a family, saved as transformers saves them."""
    model = build(family)
    model.save_pretrained(folder / "base")
    tune(model)
    model.save_pretrained(folder / "finetuned")
    return folder / "base", folder / "finetuned"
