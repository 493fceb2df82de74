"""The demo's tokenizer and architecture, and how a trained model is stored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
WINDOW = 256  # tokens, the context that the models are trained for
END, PAD = "<|end|>", "<|pad|>"


def build_tokenizer(pages: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens, every digit its own token; it can encode any text.

    `<|end|>` opens and closes a page and closes an answer. Nothing is added by itself.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(pages, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 4 blocks, width 256, grouped-query attention, untied head; fresh weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model: Any, folder: Path) -> None:
    """Round to bf16 and write an ordinary Hugging Face folder (without its tokenizer)."""
    model.to(torch.bfloat16).save_pretrained(folder)


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Give a fine-tune its base's tokenizer files, byte for byte."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
