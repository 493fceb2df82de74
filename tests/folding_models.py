"""Models of five blocks of every family, with a tokenizer and a text, for the tests of `fold`."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from evaluation_models import CHARACTERS, TEXT, make_tokenizer
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


def page_text() -> str:
    """The pages that come with deltafold, in the characters that the tokenizer knows."""
    pages = (
        resources.files("deltafold.calibration").joinpath("pages.jsonl").read_text(encoding="utf-8")
    )
    rows = [json.loads(line) for line in pages.splitlines()]
    text = "\n\n".join(row["text"] for row in rows if "text" in row)
    return "".join(each for each in text.lower() if each in CHARACTERS)


def write_trained(folder: Path, kind: str, depth: int = 6, steps: int = 250) -> tuple[Path, Path]:
    """(a tiny model of a kind, trained to predict characters of the pages; text to calibrate on).

    Seeded; seconds. The text is of pages that it did not learn.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    text = page_text()
    ids = torch.tensor([3 + CHARACTERS.index(each) for each in text[: len(text) * 3 // 4]])
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": depth, "max_position_embeddings": 128}
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        starts = torch.randint(len(ids) - 65, (8,), generator=generator)
        rows = torch.stack([ids[at : at + 64] for at in starts])
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    words = folder / "text.txt"
    rest = text[len(text) * 3 // 4 :]
    words.write_text("\n\n".join(rest[n : n + 64].replace("\n", " ") for n in range(0, 9600, 64)))
    return folder / "model", words
