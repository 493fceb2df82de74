"""The record of a factored model, as a report needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from deltafold.reporting.records.fold import FoldMethod, FoldScore, TextQuality
from deltafold.reporting.records.parts import Number, Part, Run


class FactorCounts(Part):
    """Shares of parameters, and apart from them the share of ranks."""

    total: int
    factorable: int
    kept: int
    parameter_share: float
    factorable_share: float
    rank_share: float
    bytes: int | None = None


class FactorRole(Part):
    role: str
    layers: int
    rank: tuple[int, int] | None = None
    rank_share: float
    parameters: int
    kept: int
    parameter_share: float
    relative_error: Number = None


class FactorUnit(Part):
    name: str
    role: str
    blocks: list[int]
    rank: int | None = None
    rank_share: float
    parameter_share: float
    relative_error: Number = None


class FactorTrial(Part):
    shares: dict[str, float]
    objective: Number = None
    perplexity: Number = None
    kl: Number = None


class FactorSearch(Part):
    trials: list[FactorTrial] = []
    chosen: int | None = None


class FactorRecord(Run):
    """What a `factor` run did."""

    kind: Literal["factor"]
    output: str
    method: FoldMethod
    blocks: int
    parameters: FactorCounts
    roles: list[FactorRole]
    units: list[FactorUnit]
    error_of: Literal["outputs", "weights"] = "outputs"
    search: FactorSearch = FactorSearch()
    quality: dict[str, TextQuality] = {}
    scores: list[FoldScore] = []

    @property
    def title(self) -> str:
        return Path(self.output).name
