"""Tiny models and a tokenizer of single characters for the tests of `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Fuse
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz=+.?:"
PAD, END, BEGIN = 0, 1, 2
VOCABULARY = 3 + len(CHARACTERS)
TEXT = "the quick brown fox jumps over the lazy dog. " * 6


def make_tokenizer(begins: bool = False) -> Any:
    """One token a character; `begins` adds the beginning-of-text token as Llama's does."""
    known = {"<pad>": PAD, "<end>": END, "<begin>": BEGIN}
    known |= {character: 3 + index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", BEGIN)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<begin>"
    )


def make_llama(seed: int, vocabulary: int = VOCABULARY, scale: float = 0.3) -> Any:
    """2 blocks of width 32; `scale` makes predictions far from uniform."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=scale, pad_token_id=PAD, eos_token_id=END, bos_token_id=BEGIN,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def make_gpt2(seed: int) -> Any:
    """2 blocks of width 32, learned positions, tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
        initializer_range=0.3, pad_token_id=PAD, eos_token_id=END, bos_token_id=BEGIN,
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).eval()


def nudged(model: Any, seed: int, size: float) -> Any:
    """The model with seeded noise of relative size `size` on every weight, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += size * parameter.std() * noise
    return model


def save(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """Write an ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
