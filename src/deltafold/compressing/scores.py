"""What a compression costs on tasks: base, fine-tune and archive answer the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltafold.running.engine import Progress, Step


def check_tasks(tasks: Sequence[str | Path], finetuned: str | Path, limit: int | None) -> None:
    """A broken file, and a missing tokenizer, are told of before any work. Raises DeltafoldError."""
    from deltafold.evaluation.data import read_tasks
    from deltafold.evaluation.loading import load_tokenizer, model_folder, quiet
    from deltafold.evaluation.plan import Request

    Request(tuple(map(str, tasks)), limit=limit)
    read_tasks(tasks, limit)
    model_folder(finetuned)
    with quiet():
        load_tokenizer(finetuned)


def compress_scores(
    base: str | Path,
    finetuned: str | Path,
    archive: Path,
    tasks: Sequence[str | Path],
    progress: Progress | None,
    **evaluating: Any,
) -> list[dict[str, Any]]:
    """Rows of base, fine-tune and archive, as `evaluate` makes them.

    `evaluating`: what `evaluate` takes besides (`limit`, `answers`, `dtype`, ...).
    """
    from deltafold.evaluation import evaluate

    told = 0

    def report(line: str) -> None:
        nonlocal told
        if progress:
            progress(Step("score", line, told, 3 * (1 + len(tasks)), 0))
        told += 1

    found = evaluate(finetuned, [archive], base, tasks, report=report, **evaluating)
    report("")
    return list(found["models"])
