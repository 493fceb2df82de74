"""A model, and what a verb has made of it, measured on the same tasks and texts, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.models import quiet
from deltafold.checkpoint import local_folder
from deltafold.evaluation.data import read_tasks
from deltafold.evaluation.loading import (
    choose_device,
    choose_dtype,
    end_token_ids,
    load_tokenizer,
    loaded,
)
from deltafold.evaluation.plan import Plan
from deltafold.evaluation.request import Measuring
from deltafold.evaluation.segments import Subject
from deltafold.running.engine import Progress, Step
from deltafold.running.memory import Meter
from deltafold.running.record import (
    Record,
    is_main_process,
    record_path,
    write_afterwards,
)

SPEED_TOKENS, SPEED_TRIES = 32, 3


def scored(asked: Any, run: Callable[[Any], Record], label: str) -> Record:
    """What a verb that makes one model of another records; with tasks, both measured before and after.

    `asked` is the verb's request, a `Scored`. Of several processes the first one measures. Raises
    DeltafoldError, most of it before any work.
    """
    texts = tuple(map(str, getattr(asked, "texts", ())))
    if not asked.tasks and not texts:
        return run(asked)
    request = Measuring(
        tasks=asked.tasks, texts=texts, batch_size=asked.batch_size, limit=asked.limit,
        answers=asked.answers,
    )  # fmt: skip
    wanted, where = choose_dtype(asked.dtype), choose_device(asked.device)
    read_tasks(request.tasks, request.limit)  # a broken file, a missing tokenizer: reported first
    load_tokenizer(asked.model)
    record = run(asked)
    if asked.dry_run or not is_main_process():
        return record
    with Meter() as meter:
        record["scores"] = before_and_after(
            request, asked.model, asked.output, wanted, where, asked.progress, ("whole", label)
        )
    record["score_seconds"] = meter.seconds
    write_afterwards(
        record, Path(asked.record or record_path(Path(asked.output))), Path(asked.output)
    )
    return record


def before_and_after(
    request: Measuring,
    model: str | Path,
    output: str | Path,
    dtype: torch.dtype | None,
    device: str,
    progress: Progress | None,
    labels: tuple[str, str],
) -> list[dict[str, Any]]:
    """A row for each of the two models; that of the second has KL and agreement with the first, too."""
    before, after = labels

    def tell(label: str, done: int) -> None:
        if progress:
            progress(Step("score", label, done, 2, 0))

    with quiet():
        tokenizer = load_tokenizer(model)
        plan = Plan(request, tokenizer, end_token_ids(model, tokenizer))
        tell(before, 0)
        with loaded(before, model, None, dtype, device) as whole:
            if plan.request.texts:
                plan.cut_texts(whole)
            rows = [_row(plan, whole, None, model)]
            tell(after, 1)
            with loaded(after, output, None, dtype, device) as folded:
                rows.append(_row(plan, folded, whole, output))
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
