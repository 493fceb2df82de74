"""The two files of a PEFT LoRA adapter, written as PEFT reads them.

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight            r x i
                                base_model.model.<module>.lora_B.weight            o x r
                                base_model.model.<module>.lora_embedding_A         r x vocabulary
                                base_model.model.<module>.lora_embedding_B         width x r
                                base_model.model.<module>.weight                   a norm, whole
    adapter_config.json         ranks, scales, which modules

alpha = r everywhere, so that nothing is scaled. Of an embedding's delta D = B A (vocabulary x width)
PEFT's A is B^T and its B is A^T: it looks rows up in A.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltafold.exporting.places import Kind, Layout, Place

_PREFIX = "base_model.model."


def pair_tensors(place: Place, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """Names and tensors of a pair at one place. `a` is r x i, `b` is r x o (B^T)."""
    names = pair_names(place)
    if place.kind == "embedding":
        return {names[0]: b.contiguous(), names[1]: a.T.contiguous()}
    return {names[0]: a.contiguous(), names[1]: b.T.contiguous()}


def pair_names(place: Place) -> tuple[str, str]:
    """Names of PEFT's A and B at one place."""
    if place.kind == "embedding":
        stem = f"{_PREFIX}{place.module}.lora_embedding_"
        return f"{stem}A", f"{stem}B"
    stem = f"{_PREFIX}{place.module}.lora_"
    return f"{stem}A.weight", f"{stem}B.weight"


def pair_shapes(
    place: Place, shape: tuple[int, int], rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of PEFT's A and B for an o x i delta."""
    o, i = shape
    return ((rank, o), (i, rank)) if place.kind == "embedding" else ((rank, i), (o, rank))


def whole_name(module: str, leaf: str) -> str:
    """Name of a parameter that is given whole."""
    return f"{_PREFIX}{module}.{leaf}"


def adapter_config(
    base: str, layout: Layout, ranks: Mapping[str, int], whole: Iterable[str]
) -> dict[str, Any]:
    """`adapter_config.json`. `ranks` by module; `whole` are modules given whole.

    The most common rank is PEFT's `r`; the others stand in `rank_pattern` and, so that every scale
    is 1, in `alpha_pattern`.
    """
    kinds: set[Kind] = {layout.modules[module] for module in ranks}
    counted = Counter(ranks.values())
    usual = min(counted, key=lambda rank: (-counted[rank], rank)) if counted else 1
    others = {_pattern(module): rank for module, rank in sorted(ranks.items()) if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if layout.causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": target_modules(ranks, layout.modules),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    if saved := sorted(whole):
        config["modules_to_save"] = saved
    if layout.tied and any(_is_head(module, layout) for module in ranks):
        config["ensure_weight_tying"] = True
    return config


def _pattern(module: str) -> str:
    """PEFT reads keys as regular expressions; a dot then stands for any character."""
    return module.replace(".", r"\.")


def _is_head(module: str, layout: Layout) -> bool:
    twins = [places for places in layout.places.values() if len(places) > 1]
    return any(place.module == module for places in twins for place in places)


def target_modules(targets: Iterable[str], modules: Mapping[str, Kind]) -> list[str]:
    """The shortest list that names the target modules and no others.

    A last name (`q_proj`) where all modules of that name are targets, whole paths otherwise.

    >>> target_modules(["a.0.q", "a.1.q", "a.0.k"], dict.fromkeys(
    ...     ["a.0.q", "a.1.q", "a.0.k", "a.1.k"], "linear"))
    ['a.0.k', 'q']
    """
    wanted = set(targets)
    missed = {module.rpartition(".")[2] for module in modules if module not in wanted}
    return sorted({m if (leaf := m.rpartition(".")[2]) in missed else leaf for m in wanted})


def config_text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
