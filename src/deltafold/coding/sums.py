"""Products of factors whose fp32 results are the same on every machine, by any library.

    C[a, b] = fp32( sum over j of L[j, a] R[j, b] )        in fp64, j ascending, one term at a time

Matrix multiplication adds in an order of its own, and on a GPU in another one. Its fp64 result differs
from the one above by less than `bound` times the sum of the terms' magnitudes, so both round to the
same fp32 wherever no border of rounding lies that near: nearly everywhere. The few entries left are
added again, one term at a time. So a sum costs what a fast one does, and is certain to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from deltafold.lazy import torch
from deltafold.running.devices import put

_VALUES = 1 << 19  # of a chunk: what it takes stays near the core
_TERMS = 1 << 22  # of entries added again, at a time
_SMALLEST = 2.0**-149  # of fp32: what a product of magnitudes may lose


def rounded_sum(base: torch.Tensor, change: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """base + change in `dtype`: added in fp32, rounded once. `change` (fp32, same shape) is used up.

    Beyond the largest number of `dtype` it is that number: an approximated change must not turn a
    large weight into infinity. What is infinite in the base stays so.
    """
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    total = change.add_(base).clamp_(-most, most)
    if base.numel() and not all(bool(end.isfinite()) for end in base.aminmax()):
        total = torch.where(base.isfinite(), total, base)
    return total.to(dtype)


def all_finite(x: torch.Tensor) -> bool:
    """True if no value (any shape) is infinite or NaN. Of any dtype, also 8 bits, which torch cannot ask."""
    if not x.is_floating_point():
        return True
    parts = x.reshape(-1).split(_VALUES)
    return all(bool((p.float() if p.itemsize == 1 else p).isfinite().all()) for p in parts)


def squared(x: torch.Tensor) -> float:
    """Sum of squares of what is finite, any shape, in fp64, where even that would overflow 1e300."""
    found = float(x.float().square().sum(dtype=torch.float64))
    if math.isfinite(found):
        return found
    wide = x.double().nan_to_num(0.0, 0.0, 0.0)
    return min(float(wide.square().sum()), 1e300)


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sum of squared differences, one shape, fp32; what is not finite counts nothing. See `squared`."""
    found = float((a.float() - b.float()).square().sum(dtype=torch.float64))
    return found if math.isfinite(found) else squared(a.double() - b.double())


def bound(terms: int) -> float:
    """How far two fp64 sums of so many products can be apart, per sum of their magnitudes.

    Each is off by terms x 2^-53 at most, fused or not; a little more for what this check rounds.
    """
    return (2 * terms + 8) * 2.0**-53 * 1.01


def product_rows(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """left^T right (left r x o, right r x i, fp32 or fp64) as (first row, fp32 rows on the CPU)."""
    r, o = left.shape
    i = right.shape[1]
    at, wide = put(left), put(right, torch.float64)
    sizes, wide_sizes = at.abs().float(), wide.abs().float()
    step = max(1, min(o, _VALUES // max(1, i)))
    total, reach = (torch.empty(step, i, dtype=torch.float64, device=at.device) for _ in range(2))
    high = torch.empty(step, i, dtype=torch.float32, device=at.device)
    for start in range(0, o, step):
        n = min(step, o - start)
        rows = slice(start, start + n)
        torch.mm(at[:, rows].T.double(), wide, out=total[:n])
        torch.mm(sizes[:, rows].T, wide_sizes, out=high[:n])
        reach[:n].copy_(high[:n].add_(r * _SMALLEST)).mul_(bound(r))
        low = total[:n].sub_(reach[:n]).float()
        high[:n].copy_(total[:n].add_(reach[:n], alpha=2))
        found = low.cpu()
        if not torch.equal(low, high[:n]):
            a, b = (index.cpu() for index in (low != high[:n]).nonzero(as_tuple=True))
            found[a, b] = _one_by_one(left[:, rows], right, a, b)
        yield start, found


def _one_by_one(
    left: torch.Tensor, right: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The entries (a, b) of left^T right, each summed in order; fp32."""
    x, y = left.double().cpu().numpy(), right.double().cpu().numpy()
    found = np.zeros(len(a))
    step = max(1, _TERMS // max(1, len(x)))
    for start in range(0, len(a) if len(x) else 0, step):
        here = slice(start, start + step)
        terms = x[:, a[here].numpy()] * y[:, b[here].numpy()]
        found[here] = np.add.accumulate(terms, axis=0)[-1]
    return torch.from_numpy(found).float()
