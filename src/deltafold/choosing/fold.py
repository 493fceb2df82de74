"""`fold` with what it costs and saves measured on tasks: the model before and after, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltafold.checkpoint import local_folder
from deltafold.engine import Progress, Step
from deltafold.evaluation.data import read_tasks
from deltafold.evaluation.loading import (
    choose_device,
    choose_dtype,
    end_token_ids,
    load_tokenizer,
    loaded,
    quiet,
)
from deltafold.evaluation.plan import Plan, Request
from deltafold.evaluation.segments import Subject
from deltafold.record import Meter, Record, record_path, write_record
from deltafold.verbs.fold import fold as fold_verb

SPEED_TOKENS, SPEED_TRIES = 32, 3


def fold(
    model: str | Path,
    output: str | Path,
    method: str = "auto",
    *,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    **settings: Any,
) -> Record:
    """Fold a model into the folder `output`; see `deltafold.verbs.fold.fold` for `settings`.

    Args:
        tasks: files of rows, as `evaluate` takes them, that the model answers before and after; at
            most `limit` rows of each. Then the record also has tokens a second and bytes of weights.
        dtype, device: of that measurement; `auto` is the model's own.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    >>> fold("smollm2/", "smaller/", blocks=6, tasks=["sums.jsonl"])            # doctest: +SKIP
    """
    if not tasks:
        return fold_verb(model, output, method, **settings)
    asked = settled(model, tasks, limit, batch_size, dtype, device)
    record = fold_verb(model, output, method, **settings)
    if settings.get("dry_run"):
        return record
    return before_and_after(record, asked, model, output, "folded", settings)


@dataclass(frozen=True)
class Asked:
    """What is to be measured before and after, and in what; `dtype` None is the model's own."""

    request: Request
    dtype: torch.dtype | None
    device: str


def settled(
    model: str | Path,
    tasks: Sequence[str | Path],
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: str | None,
) -> Asked:
    """The measurement; a broken file, and a missing tokenizer, are told of before any work."""
    request = Request(tuple(map(str, tasks)), batch_size=batch_size, limit=limit)
    asked = Asked(request, choose_dtype(dtype), choose_device(device))
    read_tasks(request.tasks, limit)
    load_tokenizer(model)
    return asked


def before_and_after(
    record: Record,
    asked: Asked,
    model: str | Path,
    output: str | Path,
    label: str,
    settings: dict[str, Any],
) -> Record:
    """The record with its scores: rows `whole` and `label`, whose KL is on the answers' tokens."""
    with Meter() as meter:
        record["scores"] = _scores(asked, model, output, label, settings.get("progress"))
    record["score_seconds"] = meter.seconds
    write_record(record, Path(settings.get("record") or record_path(Path(output))))
    return record


def _scores(
    asked: Asked, model: str | Path, output: str | Path, label: str, progress: Progress | None
) -> list[dict[str, Any]]:
    def tell(name: str, done: int) -> None:
        if progress:
            progress(Step("score", name, done, 2, 0))

    with quiet():
        tokenizer = load_tokenizer(model)
        plan = Plan(asked.request, tokenizer, end_token_ids(model, tokenizer))
        tell("whole", 0)
        with loaded("whole", model, None, asked.dtype, asked.device) as whole:
            rows = [_row(plan, whole, None, model)]
            tell(label, 1)
            with loaded(label, output, None, asked.dtype, asked.device) as made:
                rows.append(_row(plan, made, whole, output))
    tell("", 2)
    return rows


def _row(plan: Plan, subject: Subject, teacher: Subject | None, path: str | Path) -> dict[str, Any]:
    return {
        "label": subject.label,
        "role": subject.label,
        "path": str(path),
        "metrics": plan.measure(subject, teacher, lambda line: None),
        "tokens_per_second": speed(subject),
        "weight_bytes": weight_bytes(path),
    }


def weight_bytes(path: str | Path) -> int:
    """Bytes of a folder's weight files."""
    files = [*local_folder(path).glob("*.safetensors"), *local_folder(path).glob("*.bin")]
    return sum(file.stat().st_size for file in files)


@torch.inference_mode()
def speed(subject: Subject) -> float:
    """Tokens a second of greedy generation with one row, the best of three tries."""
    ids = torch.full((1, 8), 1, device=subject.device)
    found = 0.0
    for _ in range(SPEED_TRIES):
        start = time.perf_counter()
        subject.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=SPEED_TOKENS, max_new_tokens=SPEED_TOKENS,
        )  # fmt: skip
        found = max(found, SPEED_TOKENS / (time.perf_counter() - start))
    return found
