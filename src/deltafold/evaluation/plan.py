"""What is measured on every model, tokenised once, so that all models get the very same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deltafold.errors import MismatchError
from deltafold.evaluation.choices import Choices
from deltafold.evaluation.data import TaskFile, read_tasks, read_texts
from deltafold.evaluation.exact_match import ExactMatch
from deltafold.evaluation.lm_eval import Harness
from deltafold.evaluation.perplexity import Texts
from deltafold.evaluation.request import Measuring
from deltafold.evaluation.segments import Encoder, Segment, Subject

DEFAULT_MAX_LENGTH = 512


class Plan:
    """The measurements of one evaluation. Files are read, and checked, before a model is."""

    def __init__(self, request: Measuring, tokenizer: Any, end_ids: Sequence[int]):
        self.request = request
        self.tokenizer = tokenizer
        self.task_files = read_tasks(request.tasks, request.limit)
        self.text_files = read_texts(request.texts)
        self.harness = None
        if request.harness_tasks:
            self.harness = Harness.prepare(
                request.harness_tasks,
                request.lm_eval_path,
                tokenizer,
                request.batch_size,
                request.limit,
            )
        self._encoder = Encoder(tokenizer)
        self.tasks = [self._prepare_task(task, end_ids) for task in self.task_files]
        self.texts: Texts | None = None
        self.max_length: int | None = None

    def _prepare_task(self, task: TaskFile, end_ids: Sequence[int]) -> ExactMatch | Choices:
        if task.kind == "choices":
            return Choices.prepare(task, self._encoder, self.request.batch_size)
        asked = self.request
        return ExactMatch.prepare(
            task, self._encoder, end_ids, asked.batch_size, asked.max_new_tokens, asked.answers
        )

    def cut_texts(self, finetuned: Subject) -> None:
        """Cut the texts into windows that the fine-tune can take."""
        if not self.text_files:
            return
        limit = context_limit(finetuned)
        self.max_length = self.request.max_length or min(DEFAULT_MAX_LENGTH, limit or 1 << 30)
        self.texts = Texts.prepare(
            self.text_files,
            self._encoder,
            self.max_length,
            self.request.batch_size,
            self.request.limit,
        )

    def check_fits(self, subject: Subject) -> None:
        """Raises MismatchError when a row is too long, or a token unknown, for the model."""
        limit = context_limit(subject)
        needs = [task.longest() for task in self.tasks]
        if self.texts is not None:
            needs.append((max(len(each.ids) for each in self.texts.segments), "the text"))
        for n_tokens, what in needs:
            if limit is not None and n_tokens > limit:
                remedy = "--max-length" if what == "the text" else "shorter prompts"
                raise MismatchError(
                    f"{subject.label} takes at most {limit:,} tokens, but {what} needs "
                    f"{n_tokens:,}; give {remedy}."
                )
        rows = subject.model.get_input_embeddings().weight.shape[0]
        highest = max((max(each.ids) for each in self._segments()), default=0)
        if highest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise MismatchError(
                f"{subject.label} has {rows:,} vocabulary entries and does not know the token "
                f"{token!r} of the fine-tune, which the rows or texts contain; remove it there."
            )

    def _segments(self) -> list[Segment]:
        groups = [task.segments for task in self.tasks]
        if self.texts is not None:
            groups.append(self.texts.segments)
        return [segment for group in groups for segment in group]

    def measure(
        self, subject: Subject, teacher: Subject | None, report: Callable[[str], None]
    ) -> dict[str, Any]:
        """The metrics of one model; `teacher` is None for the fine-tune itself.

        `answers`, where any are kept: prompts with what the model wrote, all tasks in one list.
        """
        self.check_fits(subject)
        metrics: dict[str, Any] = {}
        if self.texts is not None:
            report(f"{subject.label}: text")
            metrics |= self.texts.measure(subject, teacher)
        if self.tasks:
            metrics["tasks"] = {}
        for task in self.tasks:
            report(f"{subject.label}: {task.name}")
            figures = task.measure(subject, teacher)
            if written := figures.pop("answers", []):
                metrics.setdefault("answers", []).extend(written)
            metrics["tasks"][task.name] = figures
        if self.harness is not None:
            report(f"{subject.label}: lm-eval")
            metrics["lm_eval"] = self.harness.measure(subject)
        return metrics

    def settings(self) -> dict[str, Any]:
        """The one setting of all models, for the record."""
        return self.request.measured() | {
            "max_length": self.max_length,
            "texts": [{"path": str(file.path), "digest": file.digest} for file in self.text_files],
            "text_windows": len(self.texts.segments) if self.texts else 0,
            "tasks": [
                _describe_task(file, task)
                for file, task in zip(self.task_files, self.tasks, strict=True)
            ],
        }


def _describe_task(file: TaskFile, task: ExactMatch | Choices) -> dict[str, Any]:
    described = {
        "name": file.name,
        "path": str(file.path),
        "digest": file.digest,
        "kind": file.kind,
        "rows": file.n_rows,
    }
    if isinstance(task, ExactMatch):
        described["max_new_tokens"] = task.max_new_tokens
    return described


def context_limit(subject: Subject) -> int | None:
    """The most tokens that the model takes at once, or None where its config names no bound."""
    limit = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None
