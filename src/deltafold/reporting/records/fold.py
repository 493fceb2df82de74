"""The record of a fold, as a report needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from deltafold.reporting.records.evaluate import EvaluatedModel
from deltafold.reporting.records.parts import Number, Part, Run


class FoldMethod(Part):
    name: str


class Removed(Part):
    blocks: list[int]
    layer_share: float
    parameter_share: float


class FoldStep(Part):
    """Blocks `gone`, in the place of which `kept` stands, with its share `ratio` of a sum."""

    gone: list[int]
    kept: int | None = None
    ratio: Number = None
    score: Number = None
    part: str | None = None


class Silenced(Part):
    block: int
    part: str


class StateSimilarity(Part):
    """The matrix over the states of the model as it was."""

    name: str
    values: list[list[float]]


class TextQuality(Part):
    perplexity: Number = None
    kl: Number = None
    agreement: Number = None


class Exam(Part):
    """A look at rows held out, nats a token."""

    step: int
    kl: Number = None


class Training(Part):
    """What `--steps` did."""

    steps: int
    best_step: int
    training_tokens: int
    rate_scale: float = 1.0
    exams: list[Exam] = []


class FoldScore(EvaluatedModel):
    """The model before or after, with its speed and size."""

    tokens_per_second: Number = None
    weight_bytes: Number = None


class FoldRecord(Run):
    """What a `fold` run did."""

    kind: Literal["fold"]
    output: str
    method: FoldMethod
    blocks: int
    removed: Removed
    kept: list[int]
    steps: list[FoldStep] = []
    silenced: list[Silenced] = []
    similarity: StateSimilarity | None = None
    quality: dict[str, TextQuality] = {}
    healing: Training | None = None
    unhealed_because: str | None = None
    scores: list[FoldScore] = []

    @property
    def title(self) -> str:
        return Path(self.output).name
