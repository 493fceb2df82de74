"""Consensus: several deltas of one tensor, each with its weight, become one.

One function a row of `CONSENSUS`: deltas (k of one shape, fp32), weights (k), numbers of its own ->
the merged delta, before the global scale. Entries that a sparsifier set to zero do not vote. Rules
that treat each entry by itself run over pieces of a tensor, so that they hold no copies of all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

Deltas = Sequence[torch.Tensor]
Consensus = Callable[[Deltas, Sequence[float], dict[str, float]], torch.Tensor]
PIECE = 1 << 20  # entries at a time
NEARLY_PARALLEL = 0.9995  # cosine above which an arc is taken as a line; 1.3e-4 off at most


def total(deltas: Deltas, weights: Sequence[float], numbers: dict[str, float]) -> torch.Tensor:
    """sum w_i D_i: task arithmetic, Ilharco et al. 2022 (arXiv 2212.04089). `normalize`: the mean.

    Deltas of one shape.
    """
    out = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        out.add_(delta, alpha=weight)
    whole = sum(weights) if numbers.get("normalize", 0) else 1.0
    return out.div_(whole) if whole else out.zero_()


def mean(deltas: Deltas, weights: Sequence[float], numbers: dict[str, float]) -> torch.Tensor:
    """sum w_i D_i / sum w_i, deltas of one shape: the weighted average. Zeros if weights sum to 0."""
    return total(deltas, weights, {"normalize": 1.0})


def ties(deltas: Deltas, weights: Sequence[float], numbers: dict[str, float]) -> torch.Tensor:
    """Elect a sign for each entry of deltas of one shape, then average those that agree with it.

    sign = sgn(sum w_i D_i);  sum over agreeing i of w_i D_i / sum over the same i of w_i. Yadav et
    al. 2023 (arXiv 2306.01708), steps 2 and 3; with weights 1 it is the paper's mean. Without
    `normalize` (1) the sum is not divided. Where the sum is 0 nobody agrees, as in the paper; with
    `sign_of_zero` 1 those that are positive do.
    """
    sign = total(deltas, weights, {}).sign_()
    sign[sign == 0] = numbers.get("sign_of_zero", 0)
    out, votes = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (weight * delta * sign) > 0
        out += torch.where(agrees, delta * weight, 0.0)
        votes += agrees * abs(weight)
    if not numbers.get("normalize", 1):
        return out
    return torch.where(votes > 0, out / votes.clamp_min(1e-30), 0.0)


def slerp(deltas: Deltas, weights: Sequence[float], numbers: dict[str, float]) -> torch.Tensor:
    """Two tensors of one shape along the arc between them, at t = w_2 / (w_1 + w_2).

    sin((1 - t) a) / sin(a) X_1 + sin(t a) / sin(a) X_2, a their angle; a straight line where they
    are nearly parallel, or one is zero. Shoemake 1985. Given whole weights, not deltas.
    """
    first, second = deltas
    share = weights[1] / (weights[0] + weights[1]) if sum(weights) else 0.0
    lengths = math.sqrt(_dot(first, first) * _dot(second, second))
    cosine = _dot(first, second) / lengths if lengths else 1.0
    one, two = 1 - share, share
    if abs(cosine) <= NEARLY_PARALLEL:
        angle = math.acos(cosine)
        one, two = (math.sin(part * angle) / math.sin(angle) for part in (one, two))
    return (first * one).add_(second, alpha=two)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    pieces = zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE), strict=True)
    return sum(float((one.double() * two.double()).sum()) for one, two in pieces)


def consensus(deltas: Deltas, weights: Sequence[float], numbers: dict[str, float]) -> torch.Tensor:
    """The sum of deltas of one shape, where at least `agree` (2) models need it, by their own masks.

    mask_i = |w_i D_i| >= threshold |sum of the others|; sum w_i D_i where at least `agree` masks are
    set. Wang et al. 2024 (TALL masks and consensus merging, arXiv 2405.07813).
    """
    whole = total(deltas, weights, {})
    threshold, needed = numbers.get("threshold", 0.4), min(numbers.get("agree", 2), len(deltas))
    votes = torch.zeros_like(whole)
    for delta, weight in zip(deltas, weights, strict=True):
        own = weight * delta
        votes += (own.abs() >= threshold * (whole - own).abs()) & (own != 0)
    return torch.where(votes >= needed, whole, 0.0)


def _by_pieces(rule: Consensus) -> Consensus:
    @functools.wraps(rule)
    def run(deltas: Deltas, weights: Sequence[float], numbers: dict[str, float]) -> torch.Tensor:
        out = torch.empty(deltas[0].shape)
        flat, target = [delta.reshape(-1) for delta in deltas], out.view(-1)
        for start in range(0, len(target), PIECE):
            part = slice(start, start + PIECE)
            target[part] = rule([each[part] for each in flat], weights, numbers)
        return out

    return run


CONSENSUS: dict[str, Consensus] = {
    "sum": _by_pieces(total),
    "mean": _by_pieces(mean),
    "ties": _by_pieces(ties),
    "slerp": slerp,
    "consensus": _by_pieces(consensus),
}
WHOLE_WEIGHTS = {"slerp"}  # given base + delta, and give such
