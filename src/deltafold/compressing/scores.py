"""What a compression costs on tasks: base, fine-tune and archive answer the same rows."""

from __future__ import annotations

from pathlib import Path

from deltafold.compressing.request import CompressRequest
from deltafold.running.engine import Step
from deltafold.running.memory import Meter
from deltafold.running.record import Record, record_path, write_afterwards


def check_tasks(request: CompressRequest) -> None:
    """A broken file or a missing tokenizer is reported before any work. Raises DeltafoldError."""
    from deltafold.calibration.models import quiet
    from deltafold.evaluation.data import read_tasks
    from deltafold.evaluation.loading import load_tokenizer, model_folder

    read_tasks(request.tasks, request.limit)
    model_folder(request.finetuned)
    with quiet():
        load_tokenizer(request.finetuned)


def with_scores(record: Record, request: CompressRequest) -> Record:
    """The record with rows of base, fine-tune and archive, as `evaluate` makes them; written again."""
    from deltafold.evaluation.evaluate import evaluate

    told, output, progress = 0, Path(request.output), request.progress

    def report(line: str) -> None:
        nonlocal told
        if progress:
            progress(Step("score", line, told, 3 * (1 + len(request.tasks)), 0))
        told += 1

    with Meter() as meter:
        found = evaluate(
            request.finetuned, [output], request.base, tasks=request.tasks, report=report,
            limit=request.limit, answers=request.answers, batch_size=request.batch_size,
            dtype=request.dtype,
        )  # fmt: skip
        report("")
    record["scores"] = list(found["models"])
    record["score_seconds"] = meter.seconds
    write_afterwards(record, Path(request.record or record_path(output)), output)
    return record
