"""An adapter as llama.cpp reads it: one GGUF file of pairs.

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    blk.0.attn_q.weight.lora_a     r x i      (numpy's order; GGUF counts dimensions from the other end)
    blk.0.attn_q.weight.lora_b     o x r
    token_embd.weight.lora_a       vocabulary x r
    token_embd.weight.lora_b       width x r

llama.cpp scales each pair by alpha / r, with one alpha for all; where ranks differ, B is multiplied
by r / alpha, so that every pair counts as it is.

Rows of q and k. The models that GGUF calls `llama` turn neighbouring values by one angle, those of
transformers the two halves of a head; their q and k are stored with rows in another order:

    row h d + half d/2 + j   ->   row h d + 2 j + half      (d values a head, half 0 or 1, j < d/2)

A permutation P of W's rows is one of B's, P (W + B A) = P W + (P B) A, and A stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deltafold.errors import MismatchError, UsageError
from deltafold.exporting.places import Layout, Place

# model type of transformers -> name of the architecture in GGUF
ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3",
    "qwen2_moe": "QWEN2MOE", "qwen3_moe": "QWEN3MOE", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3",
    "phi3": "PHI3", "gpt2": "GPT2",
}  # fmt: skip


def gguf_module() -> Any:
    """The package `gguf`. Raises UsageError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UsageError(
            "gguf-lora needs the package gguf: pip install 'deltafold[gguf]'."
        ) from None
    return gguf


def architecture(layout: Layout) -> str:
    """The name of an architecture in GGUF. Raises MismatchError for one that is not known here."""
    if layout.model_type not in ARCHITECTURES:
        raise MismatchError(
            f"How GGUF names the tensors of {layout.model_type!r} models is not known here; known: "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[layout.model_type]


class LoraFile:
    """A writer of one adapter. Pairs are spooled to disk until `finish`."""

    def __init__(self, path: Path, layout: Layout, alpha: float):
        gguf = gguf_module()
        kind = gguf.MODEL_ARCH[architecture(layout)]
        config = layout.config
        depth = int(config.get("num_hidden_layers") or config["n_layer"])
        self._names = gguf.get_tensor_name_map(kind, depth)
        self._layout, self._alpha = layout, alpha
        self._writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind], use_temp_file=True)
        self._writer.add_type(gguf.GGUFType.ADAPTER)
        self._writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        self._writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    def name(self, place: Place) -> str:
        """The tensor's name in GGUF. Raises MismatchError where there is none."""
        found = self._names.get_name(f"{place.module}.weight", try_suffixes=(".weight",))
        if found is None:
            raise MismatchError(
                f"GGUF has no name for {place.module} in a {self._layout.model_type} model; "
                "export --to peft instead."
            )
        return str(found)

    def add(self, place: Place, a: torch.Tensor, b: torch.Tensor) -> None:
        """One pair: `a` is r x i, `b` is r x o (B^T). Raises MismatchError."""
        name, rank = self.name(place), len(a)
        first, second = a.float(), b.float().T * (rank / self._alpha)
        if place.kind == "embedding":
            first, second = second, first.T
        else:
            second = self._turned(place, second)
        self._writer.add_tensor(f"{name}.lora_a", first.contiguous().numpy())
        self._writer.add_tensor(f"{name}.lora_b", second.contiguous().numpy())

    def _turned(self, place: Place, b: torch.Tensor) -> torch.Tensor:
        leaf, config = place.module.rpartition(".")[2], self._layout.config
        if architecture(self._layout) != "LLAMA" or leaf not in ("q_proj", "k_proj"):
            return b
        heads = int(config["num_attention_heads"])
        if leaf == "k_proj":
            heads = int(config.get("num_key_value_heads") or heads)
        return interleaved(b, heads)

    def finish(self) -> None:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads d x n) in the order of GGUF's `llama` models.

    >>> interleaved(torch.arange(8)[:, None], 2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    o, n = rows.shape
    return rows.reshape(heads, 2, o // heads // 2, n).transpose(1, 2).reshape(o, n)
