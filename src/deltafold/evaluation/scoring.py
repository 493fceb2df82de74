"""How models do on the same tasks and texts, each asked through its own tokenizer.

A task's figure is the share of rows that are right. The loss of the right answers, in nats a token,
goes along: it tells candidates apart that are right equally often.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.models import quiet
from deltafold.checkpoint.writer import put_file
from deltafold.evaluation.divergence import score
from deltafold.evaluation.estimate import ratio_of_sums
from deltafold.evaluation.exact_match import ExactMatch
from deltafold.evaluation.loading import end_token_ids, is_archive, load_tokenizer, loaded
from deltafold.evaluation.plan import Plan
from deltafold.evaluation.request import Measuring
from deltafold.evaluation.segments import Subject

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Scoring:
    """What is measured, and how. `dtype` None is a model's own."""

    request: Measuring
    dtype: torch.dtype | None = None
    device: str = "cpu"

    def of_source(self, label: str, source: str | Path, base: str | Path) -> Metrics:
        """Figures of a folder or an archive. Raises DeltafoldError."""
        with quiet(), _own_files(source, base) as folder:
            tokenizer = load_tokenizer(folder)
            plan = Plan(self.request, tokenizer, end_token_ids(folder, tokenizer))
            with loaded(label, source, base, self.dtype, self.device) as subject:
                return _measured(plan, subject)

    def of_states(
        self, files: Mapping[str, bytes], label: str
    ) -> Callable[[dict[str, Any]], Metrics]:
        """A function that scores tensors in memory, for models with these side files."""
        from transformers import GenerationConfig

        from deltafold.restoring.load import model_of

        with quiet(), tempfile.TemporaryDirectory() as name:
            folder = write_files(files, Path(name))
            tokenizer = load_tokenizer(folder)
            plan = Plan(self.request, tokenizer, end_token_ids(folder, tokenizer))

        def measure(state: dict[str, Any]) -> Metrics:
            with quiet(), tempfile.TemporaryDirectory() as name:
                folder = write_files(files, Path(name))
                model = model_of(folder, state, label, dtype=self.dtype or "auto").to(self.device)
                model.generation_config = GenerationConfig()
                return _measured(plan, Subject(label, model))

        return measure


def write_files(files: Mapping[str, bytes], folder: Path) -> Path:
    """The folder, with these files in it."""
    for name, data in files.items():
        put_file(folder, name, data)
    return folder


@contextmanager
def _own_files(source: str | Path, base: str | Path) -> Iterator[str | Path]:
    """A folder with the model's tokenizer: an archive's files are laid out for a while."""
    from deltafold.restoring.load import side_files

    if not is_archive(source):
        yield source
        return
    with tempfile.TemporaryDirectory() as name:
        side_files(source, base, Path(name))
        yield Path(name)


def _measured(plan: Plan, subject: Subject) -> Metrics:
    plan.cut_texts(subject)
    metrics = plan.measure(subject, None, lambda line: None)
    for task in plan.tasks:
        if isinstance(task, ExactMatch):
            scores = score(subject, task.segments, task.batch_size)
            loss = ratio_of_sums(scores.loss, scores.tokens)
            metrics["tasks"][task.name]["answer_loss"] = loss
    return metrics


def share_right(metrics: Metrics) -> float | None:
    """Mean over tasks of the share of rows that are right; None without tasks."""
    tasks = metrics.get("tasks") or {}
    shares = [(each.get("exact_match") or each.get("accuracy"))["value"] for each in tasks.values()]
    return sum(shares) / len(shares) if shares else None


def mean_loss(metrics: Metrics) -> float:
    """Mean of the losses of answers, or where there are none of the text, in nats a token."""
    losses = [
        each["answer_loss"]["value"] for each in (metrics.get("tasks") or {}).values()
        if "answer_loss" in each
    ]  # fmt: skip
    if "perplexity" in metrics:
        losses.append(math.log(metrics["perplexity"]["value"]))
    return sum(losses) / len(losses) if losses else 0.0


def best_of(tried: Sequence[Metrics | None]) -> int:
    """The one that is right most often; of those, and without tasks, the one with the least loss.

    None stands for a candidate that could not be measured.
    """

    def order(number: int) -> tuple[float, float, int]:
        metrics = tried[number]
        assert metrics is not None
        return -(share_right(metrics) or 0.0), mean_loss(metrics), number

    return min((n for n, metrics in enumerate(tried) if metrics is not None), key=order)
