"""What a saved model folder can do: exact match, multiple choice, perplexity, size of its delta.

Everything here loads the stored bf16 folder with plain transformers, as a stranger would.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from data import TASKS, Row
from model import WINDOW
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROLES = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "norm": "norm",
    "self_attn": "attention",
    "mlp": "mlp",
}


def load(folder: Path) -> tuple[Any, Any]:
    """The (model in its stored dtype, tokenizer) of an HF folder, ready for evaluation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, rows: list[Row], batch: int = 50) -> float:
    """Share of rows whose greedy continuation, up to the end token, is the answer exactly."""
    correct = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        made = model.generate(**inputs, max_new_tokens=16, do_sample=False, use_cache=True)
        new = made[:, inputs["input_ids"].shape[1] :]
        for row, tokens in zip(part, new, strict=True):
            correct += tokenizer.decode(tokens, skip_special_tokens=True) == row["answer"]
    return correct / len(rows)


@torch.no_grad()
def choice_accuracy(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Share of rows where the right choice has the highest log-probability per token."""
    correct = 0
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["prompt"] + choice)["input_ids"]])
            log_probs = model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
            picked = log_probs.gather(-1, ids[0, start:, None])
            scores.append(float(picked.mean()))
        correct += scores.index(max(scores)) == row["answer"]
    return correct / len(rows)


def chance(rows: list[Row]) -> float:
    """Expected accuracy of guessing."""
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)


def windows(ids: list[int]) -> Tensor:
    """Whole windows (n, 256) of a token list; the incomplete last one is left out."""
    count = len(ids) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """exp of the mean loss over windows of 256 tokens, each token but a window's first scored."""
    losses = []
    for part in windows(tokenizer(text)["input_ids"]).split(8):
        logits = model(part).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.mT, part[:, 1:], reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


def unigram_perplexity(train_ids: list[int], text_ids: list[int], vocabulary: int) -> float:
    """Perplexity of token frequencies (counts + 1) on the tokens that `perplexity` scores."""
    counts = Counter(train_ids)
    total = len(train_ids) + vocabulary
    scored = windows(text_ids)[:, 1:].flatten().tolist()
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in scored) / len(scored))


def delta_ratios(base: Path, tuned: Path) -> dict[str, float]:
    """||tuned - base|| / ||base|| (Frobenius, fp32) over all tensors of each role, and of `all`."""
    squares: dict[str, list[float]] = {}
    with (
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(tuned / "model.safetensors", "pt") as new,
    ):
        for name in old.keys():  # noqa: SIM118 - a file handle, not a dict
            before, after = old.get_tensor(name).float(), new.get_tensor(name).float()
            role = next(role for part, role in ROLES.items() if part in name)
            for key in (role, "all"):
                pair = squares.setdefault(key, [0.0, 0.0])
                pair[0] += float((after - before).square().sum())
                pair[1] += float(before.square().sum())
    return {role: math.sqrt(moved / size) for role, (moved, size) in sorted(squares.items())}


def measure(folder: Path, tasks: Path, base: Path) -> dict[str, Any]:
    """All figures of one saved model, for the training record."""
    model, tokenizer = load(folder)
    choices, stories = read_rows(tasks / "choices.jsonl"), read_rows(tasks / "stories.jsonl")
    figures: dict[str, Any] = {
        "exact_match": {
            name: exact_match(model, tokenizer, read_rows(tasks / f"{name}.jsonl"))
            for name in TASKS
        },
        "perplexity": perplexity(model, tokenizer, (tasks / "text.txt").read_text("utf-8")),
        "choice_accuracy": choice_accuracy(model, tokenizer, choices),
        "story_accuracy": choice_accuracy(model, tokenizer, stories),
        "choice_chance": chance(choices + stories),
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
    if folder != base:
        figures["delta_over_base"] = delta_ratios(base, folder)
    return figures
