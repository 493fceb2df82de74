"""Train the demo's model family: one base and one full fine-tune of it per task.

    python demo/train.py                     # everything, into demo/models and demo/tasks
    python demo/train.py --only sort         # one fine-tune again
    python demo/train.py --measure           # measure the stored models again, no training
    python demo/train.py --table             # rewrite README's table from the training record

The fine-tunes start from the *stored* bf16 base, train every parameter in fp32 with AdamW, and are
rounded to bf16 once, when saved. So fine-tune minus base is exactly what training did.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data import TASKS, Row, task_rows, world_text, write_tests
from measure import load, measure, unigram_perplexity
from model import VOCABULARY, WINDOW, build_model, build_tokenizer, copy_tokenizer, save
from record import add_to_record, environment, rewrite_table, write_record
from torch import Tensor
from transformers import PreTrainedTokenizerFast

IGNORED = -100  # the label that transformers leaves out of the loss
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; `rows` and `replay` count sequences a step."""

    steps: int
    peak_rate: float
    weight_decay: float
    rows: int
    replay: int = 0
    replay_tokens: int = 64


RECIPES = {
    "base": Recipe(steps=1500, peak_rate=2e-3, weight_decay=0.1, rows=8),
    "sort": Recipe(steps=600, peak_rate=3e-4, weight_decay=0.0, rows=64, replay=8),
    "add": Recipe(steps=1300, peak_rate=5e-4, weight_decay=0.0, rows=64, replay=8),
}


def stream_of(pages: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All pages as one token list (t,), `<|end|>` between pages."""
    end = tokenizer.eos_token_id
    ids = [token for page in tokenizer(pages)["input_ids"] for token in [end, *page]]
    return torch.tensor([*ids, end])


def text_batches(stream: Tensor, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random windows (b, t) of the stream, for ever."""
    dice = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - length, (rows,), generator=dice)
        yield torch.stack([stream[start : start + length] for start in starts.tolist()])


def task_batches(
    rows: list[Row], tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (ids, labels), each (b, t), right-padded; loss on the answer and `<|end|>` only."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["answer"] for row in rows])["input_ids"]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + 1
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
        ids[n, : len(whole)] = whole
        labels[n, len(prompt) : len(whole)] = whole[len(prompt) :]
    dice = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(rows), (count,), generator=dice)
        yield ids[chosen], labels[chosen]


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: 5 % linear warm-up, then a cosine down to a twentieth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def optimise(model: Any, recipe: Recipe, step_loss: Step) -> dict[str, Any]:
    """Run AdamW on all parameters; return steps, seconds and the loss curve (about 50 points)."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(
        groups,
        lr=recipe.peak_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: rate_at(n, recipe.steps))
    keep_every = max(1, recipe.steps // 50)
    curve: list[tuple[int, float]] = []
    start = time.perf_counter()
    model.train()
    for step in range(recipe.steps):
        loss = step_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % keep_every == 0 or step == recipe.steps - 1:
            curve.append((step, round(loss.item(), 4)))
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    seconds = time.perf_counter() - start
    return {"steps": recipe.steps, "seconds": round(seconds, 1), "loss_curve": curve}


def train_base(out: Path, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train the base on the world's text and save it; return its part of the record."""
    pages, held_out = world_text(seed)
    tokenizer = build_tokenizer(pages)
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    stream = stream_of(pages, tokenizer)
    batches = text_batches(stream, recipe.rows, WINDOW, seed)

    def step_loss() -> Tensor:
        ids = next(batches)
        return model(ids, labels=ids).loss

    figures = optimise(model, recipe, step_loss)
    save(model, out / "models" / "base")
    tokenizer.save_pretrained(out / "models" / "base")
    unigram = unigram_perplexity(stream.tolist(), tokenizer(held_out)["input_ids"], VOCABULARY)
    return figures | {"train_tokens": len(stream), "unigram_perplexity": unigram}


def train_task(name: str, out: Path, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Fine-tune every parameter of the stored base on one task, replaying some base text."""
    model, tokenizer = load(out / "models" / "base")
    model.float()
    rows, _ = task_rows(name, seed)
    task = task_batches(rows, tokenizer, recipe.rows, seed)
    stream = stream_of(world_text(seed)[0], tokenizer)
    replay = text_batches(stream, recipe.replay, recipe.replay_tokens, seed)
    weight = recipe.replay / (recipe.rows + recipe.replay)

    def step_loss() -> Tensor:
        ids, labels = next(task)
        text = next(replay)
        learnt, kept = model(ids, labels=labels).loss, model(text, labels=text).loss
        return (1 - weight) * learnt + weight * kept

    figures = optimise(model, recipe, step_loss)
    save(model, out / "models" / name)
    copy_tokenizer(out / "models" / "base", out / "models" / name)
    return figures | {"replay_share": weight}


def measure_again(record: Path, tasks: Path) -> None:
    """Renew the measured figures of every recorded model; what training wrote stays."""
    models = record.parent
    known = json.loads(record.read_text("utf-8"))
    for name, figures in known.items():
        figures |= measure(models / name, tasks, models / "base")
    write_record(record, known)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's base and its fine-tunes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--only", choices=list(RECIPES), help="train this model alone")
    parser.add_argument("--steps", type=int, help="steps instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of training")
    parser.add_argument("--table", action="store_true", help="only rewrite README.md's table")
    parser.add_argument("--measure", action="store_true", help="only measure the stored models")
    given = parser.parse_args()
    models = given.out / "models"
    record = models / "training.json"
    if (given.table or given.measure) and not record.is_file():
        parser.error(f"no {record}: train first, then use --table or --measure")
    if given.table:
        return rewrite_table(Path(__file__).parent / "README.md", record)
    if given.measure:
        write_tests(given.out, given.seed)
        return measure_again(record, given.out / "tasks")
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps must be 1 or more, not {given.steps}")
    if given.only in TASKS and not (models / "base" / "config.json").is_file():
        parser.error(f"no base in {models / 'base'}: train it first with --only base")

    write_tests(given.out, given.seed)
    for name in [given.only] if given.only else list(RECIPES):
        recipe = RECIPES[name] if given.steps is None else replace(RECIPES[name], steps=given.steps)
        print(f"{name}: {recipe}", flush=True)
        if name == "base":
            figures = train_base(given.out, recipe, given.seed)
        else:
            figures = train_task(name, given.out, recipe, given.seed)
        figures |= measure(models / name, given.out / "tasks", models / "base")
        figures |= {"seed": given.seed, "recipe": asdict(recipe), "trained_on": environment()}
        add_to_record(record, name, figures)


if __name__ == "__main__":
    main()
