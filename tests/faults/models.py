"""What the campaign's commands work on: a tiny model of four blocks, fine-tunes, archives, a text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import decaying_delta
from command_line import deltafold
from evaluation_models import BEGIN, END, PAD, TEXT, VOCABULARY, make_tokenizer, save
from transformers import LlamaConfig, LlamaForCausalLM

BLOCKS = 4


@dataclass(frozen=True)
class Models:
    """A base, two fine-tunes, archives of the first, and a text; `folder` holds them all."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned"

    @property
    def other(self) -> Path:
        return self.folder / "other"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def lossy(self) -> Path:
        return self.folder / "lossy.delta"

    @property
    def exact(self) -> Path:
        return self.folder / "exact.delta"


def make_models(folder: Path) -> Models:
    """Write all of them into a new folder."""
    found = Models(folder)
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    save(_model(None), found.base, tokenizer)
    save(_model(1), found.tuned, tokenizer)
    save(_model(2), found.other, tokenizer)
    for name, words in (("tuned", "more"), ("other", "less")):  # a small file against the base's
        config = folder / name / "config.json"
        config.write_text(config.read_text().replace("{", f'{{\n  "note": "{words}",', 1))
    found.text.write_text(TEXT * 3)
    common = ("compress", found.base, found.tuned, "-o")
    for command in (
        (*common, found.lossy, "--method", "lowrank", "--file-ratio", "2.4"),
        (*common, found.exact, "--method", "lossless"),
    ):
        told = deltafold(*command)
        assert told.code == 0, told.err
    return found


def use_cache(folder: Path) -> None:
    """What is measured from now on is kept there."""
    os.environ["DELTAFOLD_CACHE"] = str(folder)


def _model(seed: int | None) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.3, pad_token_id=PAD, eos_token_id=END, bos_token_id=BEGIN,
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).eval().bfloat16()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 2 and len(parameter) != VOCABULARY:
                    parameter += decaying_delta((parameter.shape[0], parameter.shape[1]), generator)
    return made
