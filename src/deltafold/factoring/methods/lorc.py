"""LoRC (arXiv 2410.03111): ranks of keys and values by depth, from cumulative condition numbers.

Errors of early blocks pass through all later ones, so the condition numbers are multiplied from a
block to the last. The rank falls with the logarithm of that product from `most` to `least`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

LEAST = 0.5  # share of the first block's rank that the last one keeps


def log_condition(values: torch.Tensor) -> float:
    """log(s_max / s_min) of the singular values (n,) that are not zero to working precision."""
    held = values[values > values.max() * 1e-6] if len(values) else values
    return math.log(float(held.max()) / float(held.min())) if len(held) else 0.0


def schedule(conditions: Mapping[int, Sequence[float]], least: float = LEAST) -> dict[int, float]:
    """Weight of each block, 1 for the largest cumulative condition number, `least` for the smallest.

    `conditions` are the log condition numbers of a block's matrices.
    """
    cumulative: dict[int, float] = {}
    sum_below = 0.0
    for block in sorted(conditions, reverse=True):
        sum_below += sum(conditions[block])
        cumulative[block] = sum_below
    high, low = max(cumulative.values()), min(cumulative.values())
    width = high - low
    return {
        block: 1.0 if not width else 1 - (high - value) / width * (1 - least)
        for block, value in sorted(cumulative.items())
    }
