"""Models of five blocks of every family, with a tokenizer and a text, for the tests of `fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from evaluation_models import TEXT, make_tokenizer
from tiny_models import FAMILIES, SIZES

DEPTH = 5
TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
SIZE = 3.0  # matrices this much larger than at initialisation, so that blocks do something


def build_deep(family: str, depth: int = DEPTH, dtype: torch.dtype = torch.float32) -> Any:
    """A randomly initialised model; the same weights each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, more = FAMILIES[family]
    sizes = {} if kind == "gpt2" else SIZES
    deep = {"n_layer": depth} if kind == "gpt2" else {"num_hidden_layers": depth}
    if kind == "gemma3_text":
        deep["layer_types"] = TYPES[:depth]
    config = AutoConfig.for_model(kind, **(sizes | {"vocab_size": 160} | more | deep))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(SIZE)
            elif parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def write_deep(folder: Path, family: str, depth: int = DEPTH) -> Path:
    """The model in bf16 with a tokenizer of single characters."""
    build_deep(family, depth, torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, samples: int = 8) -> Path:
    """Paragraphs of about forty characters, all different."""
    words = TEXT.split()
    parts = [" ".join(words[n % 7 :: 1 + n % 3][:7]) for n in range(samples)]
    path.write_text("\n\n".join(f"{n} {part}" for n, part in enumerate(parts)))
    return path
