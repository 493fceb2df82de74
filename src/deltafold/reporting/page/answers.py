"""Scores and sample answers of the models of a run, for its page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from deltafold.reporting.page.view import Headline, Sample, Written
from deltafold.reporting.records.evaluate import EvaluatedModel, Metric
from deltafold.reporting.units import EXACT_KL, MISSING, plain_text

OWN_WORDS = {"candidate": "restored", "whole": "before", "folded": "after"}


def label_of(model: EvaluatedModel, models: Sequence[EvaluatedModel]) -> str:
    """What the page calls a model: its role where that is enough, else its name."""
    alone = sum(each.role == model.role for each in models) == 1
    return OWN_WORDS.get(model.role, model.role) if alone else short(model.label)


def short(label: str) -> str:
    """The last part of a path or hub id."""
    return label.rstrip("/").rpartition("/")[2] or label


def right_share(model: EvaluatedModel) -> float | None:
    """Mean over tasks of the share of rows that are right."""
    shares = [right_on(model, task) for task in model.metrics.tasks]
    known = [share for share in shares if share is not None]
    return fmean(known) if known else None


def right_on(model: EvaluatedModel, task: str) -> float | None:
    found = model.metrics.tasks.get(task, {})
    return (found.get("exact_match") or found.get("accuracy") or Metric()).value


def share_text(share: float | None) -> str:
    """A share as a percentage in at most three digits: `98.3 %`, `100 %`."""
    return MISSING if share is None else f"{100 * share:.3g}\u00a0%"


def divergence_text(kl: float | None) -> str:
    """A KL divergence in two digits, never with an exponent."""
    if kl is None:
        return MISSING
    return "0" if kl <= EXACT_KL else plain_text(kl, digits=2)


def _rows(model: EvaluatedModel, task: str) -> int:
    """Rows of a task that the model answered."""
    found = model.metrics.tasks[task]
    return (found.get("exact_match") or found.get("accuracy") or Metric()).n or 0


def quality_numbers(models: Sequence[EvaluatedModel]) -> list[Headline]:
    """Of the last model, which is the run's result: right answers, and KL from the fine-tune."""
    if not models:
        return []
    *others, last = models
    numbers = []
    if (share := right_share(last)) is not None:
        tasks = list(last.metrics.tasks)
        named = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
        if counts := {n for task in tasks if (n := _rows(last, task))}:
            named += f", {max(counts):,} rows" if len(counts) == 1 else ""
        parts = [
            f"{label_of(each, models)} {share_text(right_share(each))}"
            for each in others
            if right_share(each) is not None
        ]
        numbers.append(
            Headline(share_text(share), "of answers right", f"{named}: {', '.join(parts)}")
        )
    if (kl := kl_of(last)) is not None:
        base = next((kl_of(each) for each in others if each.role == "base"), None)
        note = "nats a token; 0 means the same predictions"
        if base is not None:
            note = f"nats a token; base {divergence_text(base)}"
        from_what = "the fine-tune" if last.role == "candidate" else "the model before"
        numbers.append(Headline(divergence_text(kl), f"KL from {from_what}", note))
    return numbers


def kl_of(model: EvaluatedModel) -> float | None:
    """On text where it was measured there, else the mean over tasks."""
    if model.metrics.kl_text is not None:
        return model.metrics.kl_text.value
    found = [task["kl"].value for task in model.metrics.tasks.values() if "kl" in task]
    known = [value for value in found if value is not None]
    return fmean(known) if known else None


def samples_of(models: Sequence[EvaluatedModel]) -> list[Sample]:
    """Prompts with what every model wrote, in the order of the models."""
    prompts = {
        (answer.task, answer.prompt): answer.wanted
        for model in models
        for answer in model.metrics.answers
    }
    samples = []
    for (task, prompt), wanted in prompts.items():
        written = [
            Written(label_of(model, models), answer.text, answer.right)
            for model in models
            for answer in model.metrics.answers
            if (answer.task, answer.prompt) == (task, prompt)
        ]
        samples.append(Sample(task, prompt, wanted, written))
    return samples
