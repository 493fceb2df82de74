"""Bridge to EleutherAI's lm-evaluation-harness: its tasks on a model that is already loaded.

The harness tokenises, prompts and scores by its own rules; only batch size, limit, dtype, device
and tokenizer come from here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.errors import DeltafoldError, UsageError, nearest
from deltafold.evaluation.estimate import Figure
from deltafold.evaluation.segments import Subject
from deltafold.foreign import blamed, first_line


@dataclass(frozen=True)
class Harness:
    """Tasks of the harness, found before any model is loaded."""

    tasks: tuple[str, ...]
    manager: Any
    tokenizer: Any
    batch_size: int
    limit: int | None

    @classmethod
    def prepare(
        cls,
        tasks: Sequence[str],
        path: str | Path | None,
        tokenizer: Any,
        batch_size: int,
        limit: int | None = None,
    ) -> Harness:
        """Look the tasks up, in `path` first. Raises UsageError on an unknown one."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UsageError(
                "The tasks of --lm-eval need a further package; run "
                "pip install 'deltafold[lm-eval]'."
            )
        if path is not None and not Path(path).is_dir():
            raise UsageError(f"{path} is not a folder; give the folder of your task files.")
        return cls(tuple(tasks), _manager(tasks, path), tokenizer, batch_size, limit)

    def measure(self, student: Subject) -> dict[str, dict[str, Figure]]:
        """`{task: {metric: figure}}`, metrics named as the harness names them."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            with _quiet():
                results = lm_eval.simple_evaluate(
                    model=HFLM(
                        pretrained=student.model,
                        tokenizer=self.tokenizer,
                        batch_size=self.batch_size,
                    ),
                    tasks=list(self.tasks),
                    task_manager=self.manager,
                    limit=self.limit,
                    log_samples=False,
                )
        except Exception as error:  # data sets out of reach, tasks that do not fit the model, ...
            raise blamed(
                error,
                DeltafoldError(
                    f"lm-eval stopped on {student.label} ({first_line(error)}); "
                    "check the task, its data and your network."
                ),
            ) from error
        samples = results.get("n-samples", {})
        return {
            task: _figures(values, samples.get(task, {}).get("effective"))
            for task, values in results["results"].items()
        }


def _manager(tasks: Sequence[str], path: str | Path | None) -> Any:
    """A task manager that knows all tasks: of `path` alone if it has them, which is much faster."""
    from lm_eval.tasks import TaskManager

    known: list[str] = []
    for with_defaults in (False, True) if path is not None else (True,):
        with _quiet():
            manager = TaskManager(
                include_path=None if path is None else str(path), include_defaults=with_defaults
            )
        known = list(manager.all_tasks)
        unknown = [task for task in tasks if task not in known]
        if not unknown:
            return manager
    hint = nearest(unknown[0], known) if len(known) < 50 else "run `lm-eval ls tasks` to see all."
    raise UsageError(f"lm-eval has no task {unknown[0]!r}; {hint}")


def _figures(values: dict[str, Any], n: int | None) -> dict[str, Figure]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` -> `{"acc": {"value", "stderr", "n"}}`."""
    figures: dict[str, Figure] = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        # The harness writes "N/A" where it knows no standard error.
        known = isinstance(stderr, int | float)
        figures[name] = {"value": value, "stderr": stderr if known else None, "n": n}
    return figures


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's notes and bars off the terminal (stdout may carry JSON)."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
