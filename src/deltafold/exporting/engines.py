"""What engines take of an adapter."""

from __future__ import annotations

from deltafold.errors import UsageError, nearest
from deltafold.exporting.places import Layout, Place
from deltafold.exporting.request import RUNTIMES

LLAMA_CPP = "llama.cpp"  # follows from the format; not to be asked for

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes to which vLLM pads: its --max-lora-rank is one of these."""

# Model types whose embeddings and head vLLM (0.32) lets adapters change.
_VLLM_EMBEDDINGS = {
    "apertus", "cohere", "exaone4", "granite", "granitemoe", "jamba", "lfm2", "llama", "minicpm",
    "mistral", "mixtral", "nemotron", "phimoe", "qwen3", "qwen3_moe", "solar",
}  # fmt: skip

# Layers that PEFT (0.21) refuses to adapt, and the model types in which it does: their kernels read the
# weights themselves.
_PEFT_KERNELS = {"out_proj", "conv1d"}
_PEFT_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}

# Layers that PEFT (0.21), on transformers 5, takes for parts of the experts, which are one parameter there:
# it looks at their last names, by the family of mixtures that a model type belongs to.
_PEFT_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def check_runtime(name: str) -> None:
    """Raises UsageError for a runtime that is not known."""
    if name not in RUNTIMES:
        raise UsageError(f"There is no engine {name!r} for --for; {nearest(name, list(RUNTIMES))}")


def largest_rank(engine: str) -> int | None:
    """The most components that an engine takes; None for any number."""
    return VLLM_RANKS[-1] if engine == "vllm" else None


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds this rank. Raises UsageError above 512.

    >>> vllm_rank(65), vllm_rank(320)
    (128, 320)
    """
    for size in VLLM_RANKS:
        if rank <= size:
            return size
    raise UsageError(
        f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {rank}; export with --for vllm."
    )


def refusal(engine: str, place: Place, layout: Layout) -> str:
    """Why an engine does not take a delta at this place; empty if it does."""
    leaf = place.module.rpartition(".")[2]
    if engine == "peft" and layout.model_type in _PEFT_MAMBA and leaf in _PEFT_KERNELS:
        return f"PEFT does not let adapters change {leaf} of {layout.model_type} models"
    if engine == "peft" and leaf in _PEFT_EXPERTS.get(_mixture(layout.model_type), ()):
        return f"PEFT takes {leaf} of {layout.model_type} models for a part of the experts"
    if engine == "vllm":
        if place.kind == "whole":
            return "vLLM takes pairs only"
        if place.rest and layout.model_type not in _VLLM_EMBEDDINGS:
            return f"vLLM does not let adapters change the embeddings of {layout.model_type} models"
    if engine == LLAMA_CPP:
        if place.kind == "whole":
            return "llama.cpp takes pairs only"
        if place.kind == "embedding" and place.module != layout.embedding:
            return "llama.cpp looks for pairs at token embeddings only"
        if place.rest and layout.tied:
            return "llama.cpp cannot add to an embedding that is the head too"
    return ""


def _mixture(model_type: str) -> str:
    """The family of mixtures that a model type belongs to, as PEFT asks transformers; empty for none."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:  # another version of transformers: its inner parts are no promise
        return ""
    found = {"mixtral": "mixtral", **_MODEL_TO_CONVERSION_PATTERN}.get(model_type, "")
    return str(found)
