"""Units of one block matched to those of another, so that like is averaged with like.

Ainsworth et al. 2022, Git Re-Basin (arXiv 2209.04836), section 3.2, weight matching: the order of
units that maximises the sum of dot products of their weights; a linear assignment problem.
"""

from __future__ import annotations

import torch

from deltafold.errors import UsageError


def match(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """For each row of `one` (u, v) the row of `other` that it is matched with (u,), each used once.

    The sum of dot products is the greatest there is. Raises UsageError where scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UsageError(
            "Aligning needs the package scipy: pip install 'deltafold[fold]'."
        ) from None
    gains = one.double() @ other.double().T
    _, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    return torch.from_numpy(columns).long()
