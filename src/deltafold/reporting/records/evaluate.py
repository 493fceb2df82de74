"""The record of an evaluation, as a report needs it."""

from __future__ import annotations

from typing import Literal

from deltafold.reporting.records.parts import Number, Part, Run


class Metric(Part):
    """A measured mean over `n` samples."""

    value: Number = None
    stderr: Number = None
    n: int | None = None


class Answer(Part):
    """What a model wrote to a row of a task."""

    task: str
    prompt: str
    wanted: str
    text: str
    right: bool


class Metrics(Part):
    perplexity: Metric | None = None
    kl_text: Metric | None = None
    agreement_text: Metric | None = None
    tasks: dict[str, dict[str, Metric]] = {}
    lm_eval: dict[str, dict[str, Metric]] = {}
    answers: list[Answer] = []


class EvaluatedModel(Part):
    label: str
    role: str = "candidate"
    archive_bytes: Number = None
    file_ratio: Number = None
    method: str | None = None
    metrics: Metrics


class EvaluateRecord(Run):
    kind: Literal["evaluate"]
    models: list[EvaluatedModel]
