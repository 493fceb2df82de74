"""The record of a `share` run, as a report needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from deltafold.reporting.records.fold import FoldScore, TextQuality
from deltafold.reporting.records.parts import Number, Part, Run


class ShareMethod(Part):
    name: str
    placement: str = ""
    matrices: str = ""


class SharePlace(Part):
    block: int
    anchor: int | None = None
    rank: int
    write_rank: int


class CurvePoint(Part):
    """Means over the steps up to `step`; CE and KL in nats a token."""

    step: int
    loss: Number = None
    ce: Number = None
    kl: Number = None


class ReplacementPoint(Part):
    step: int
    probabilities: list[float]


class Replacement(Part):
    """Probability of each module at a step; the deepest first."""

    modules: list[str]
    steps: int
    points: list[ReplacementPoint]


class ShareRecord(Run):
    """What a `share` run did."""

    kind: Literal["share"]
    output: str
    method: ShareMethod
    blocks: int
    places: list[SharePlace]
    base_parameters: int
    parameters: int
    delta_parameters: int
    base_weight_bytes: int
    weight_bytes: int
    quality: dict[str, TextQuality] = {}
    curve: list[CurvePoint] = []
    exams: list[CurvePoint] = []
    replacement: Replacement | None = None
    search: list[dict[str, Any]] = []
    text: dict[str, Any] = {}
    steps_done: int | None = None
    best_step: int | None = None
    rate_scale: float = 1.0
    tokens_per_second_training: Number = None
    scores: list[FoldScore] = []

    @property
    def title(self) -> str:
        return Path(self.output).name
