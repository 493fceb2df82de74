"""Experts of one block: their mean, and for each a low-rank delta.

    W_e ~ M + B_e A_e,   M = mean of the W_e

After MoE-I2 (arXiv 2411.01016), which factors experts alone; the mean carries what they have in
common, so that the factors are spent on what they differ by. Without a mean each is factored alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafold.factoring.methods.basis import summed
from deltafold.linalg.whitening import DAMPING, whitened_svd


def mean_and_deltas(
    weights: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor | None],
    rank: int,
    key: int,
    with_mean: bool,
    damping: float = DAMPING,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(mean (o x i) or None, A (E x r x i), B (E x o x r)), float64.

    An expert whose inputs no text showed is given those of all others together.
    """
    known = [gram for gram in grams if gram is not None]
    common = summed(known)
    mean = torch.stack([weight.double() for weight in weights]).mean(0) if with_mean else None
    inner, outer = [], []
    for weight, gram in zip(weights, grams, strict=True):
        rest = weight.double() if mean is None else weight.double() - mean
        made = whitened_svd(rest, common if gram is None else gram, rank, key, damping)
        inner.append(made.a)
        outer.append(made.q)
    return mean, torch.stack(inner), torch.stack(outer)
