"""Tiny models of `tiny_models` as GGUF files in fp32, for tests that run llama.cpp.

Written from what llama.cpp reads, and apart from what the package writes: orders of rows and
transposes stand here once more. Tokens have no meaning; prompts are given as numbers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from checkpoints import read_checkpoint

ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "phi3": "phi3",
    "gpt2": "gpt2", "mixtral": "llama", "qwen2_moe": "qwen2moe",
}  # fmt: skip


def write_gguf(folder: Path, path: Path) -> Path:
    """The Hugging Face folder of a tiny model as a GGUF file."""
    config = json.loads((folder / "config.json").read_text())
    name = ARCHITECTURES[config["model_type"]]
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    writer = gguf.GGUFWriter(path, name)
    _write_sizes(writer, config)
    _write_tokens(writer, config["vocab_size"])
    names = gguf.get_tensor_name_map(kind, config.get("num_hidden_layers") or config["n_layer"])
    for key, tensor in _stacked(read_checkpoint(folder)).items():
        known = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert known, key
        writer.add_tensor(known, _as_llama_cpp(key, tensor.float(), config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of one kind as one tensor, in their order."""
    found: dict[str, list[torch.Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        found.setdefault(re.sub(r"experts\.\d+\.", "experts.", key), []).append(tensor)
    return {key: torch.stack(each) if len(each) > 1 else each[0] for key, each in found.items()}


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    gpt2 = config["model_type"] == "gpt2"
    width = config["n_embd"] if gpt2 else config["hidden_size"]
    heads = config["n_head"] if gpt2 else config["num_attention_heads"]
    writer.add_context_length(config["n_positions"] if gpt2 else config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["n_layer"] if gpt2 else config["num_hidden_layers"])
    writer.add_feed_forward_length(4 * width if gpt2 else config["intermediate_size"])
    writer.add_head_count(heads)
    if gpt2:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    head = config.get("head_dim") or width // heads
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "qwen2_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "phi3":
        writer.add_sliding_window(0)


def _write_tokens(writer: Any, count: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{n}>" for n in range(count)])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_add_bos_token(False)


def _as_llama_cpp(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """A tensor in the order of rows and with the offsets that llama.cpp expects."""
    kind, leaf = config["model_type"], name.removesuffix(".weight").rpartition(".")[2]
    if kind == "gpt2" and leaf in ("c_attn", "c_proj", "c_fc") and tensor.dim() == 2:
        return tensor.T
    if kind == "gemma3_text" and "norm" in leaf:
        return tensor + 1
    if kind in ("llama", "mixtral") and leaf in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if leaf == "q_proj" else "num_key_value_heads"]
        d = len(tensor) // heads
        order = [
            h * d + half * (d // 2) + j
            for h in range(heads)
            for j in range(d // 2)
            for half in (0, 1)
        ]
        return tensor[order]
    return tensor
