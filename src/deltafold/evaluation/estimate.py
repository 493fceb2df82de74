"""Figures with standard errors: `{"value", "stderr", "n"}`, as they stand in a record."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Figure = dict[str, float | int | None]


def ratio_of_sums(sums: torch.Tensor, counts: torch.Tensor) -> Figure:
    """Mean per token from per-group sums (n,) and token counts (n,), and its standard error.

    Tokens of a group (a window of text, an answer) depend on one another, so the groups are the
    sample, not the tokens. With m = sum(s) / sum(c) (ratio estimator, Cochran 1977, eq. 6.4):

        stderr = sqrt(n / (n - 1) * sum((s - m c)^2)) / sum(c)

    `n` in the result counts tokens. With one group there is no standard error (None).
    """
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    groups = len(sums)
    stderr = None
    if groups > 1:
        residual = sums.double() - mean * counts.double()
        stderr = math.sqrt(groups / (groups - 1) * float(residual.square().sum())) / total
    return {"value": mean, "stderr": stderr, "n": int(total)}


def exponential(figure: Figure) -> Figure:
    """exp of a figure; the standard error by the delta method: exp(m) * stderr(m)."""
    value = math.exp(float(figure["value"] or 0.0))
    stderr = figure["stderr"]
    return {**figure, "value": value, "stderr": None if stderr is None else value * stderr}


def proportion(hits: Sequence[bool]) -> Figure:
    """Share of hits; the standard error is binomial, sqrt(p (1 - p) / n)."""
    n = len(hits)
    share = sum(hits) / n
    return {"value": share, "stderr": math.sqrt(share * (1 - share) / n), "n": n}
