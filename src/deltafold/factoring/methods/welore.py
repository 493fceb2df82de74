"""WeLore (arXiv 2407.11239): ranks by one threshold for all matrices.

Singular values of each matrix are scaled to 0..1 by their least and largest; its rank is how many lie
above the threshold. A matrix whose factors would not save anything stays dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafold.factoring.methods.units import Ranks, Unit, smallest, total

_HALVINGS = 50


def scaled(values: torch.Tensor) -> torch.Tensor:
    """(s - min) / (max - min) of values (n,), in the order given; ones where all are alike."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if float(high) > float(low) else torch.ones_like(values)


def ranks_above(units: Sequence[Unit], spectra: Sequence[torch.Tensor], threshold: float) -> Ranks:
    """Ranks of units, given scaled singular values (n,) of each: how many exceed the threshold."""
    found: Ranks = []
    for unit, values in zip(units, spectra, strict=True):
        rank = max(1, int((values > threshold).sum()))
        found.append(rank if rank <= unit.most else None)
    return found


def threshold_ranks(
    units: Sequence[Unit], spectra: Sequence[torch.Tensor], parameters: int
) -> tuple[float, Ranks]:
    """The lowest threshold with at most `parameters` in all, and its ranks.

    `spectra` are singular values (n,) of each unit, not scaled. Raises ValueError if not even rank
    1 fits.
    """
    if smallest(units) > parameters:
        raise ValueError(f"{parameters} parameters are fewer than the smallest: {smallest(units)}")
    fitted = [scaled(values.double()) for values in spectra]
    low, high = -1.0, 1.0  # at 1 nothing exceeds it: rank 1
    if total(units, ranks_above(units, fitted, low)) <= parameters:
        return low, ranks_above(units, fitted, low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if total(units, ranks_above(units, fitted, middle)) <= parameters:
            high = middle
        else:
            low = middle
    return high, ranks_above(units, fitted, high)
