"""Sparsifiers: a delta with part of its entries set to zero, before deltas are combined.

One function a row of `SPARSIFIERS`; each takes a delta of any shape (fp32), the share of entries to
keep, a key for its random stream, and numbers of its own. Density 1 keeps all, density 0 gives
zeros, and anything between keeps at least one entry. Keys are a tensor's and a model's own, so masks
depend neither on the order of work nor on the other models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deltafold.codecs import delta_codec
from deltafold.coding.counter import random_u32
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix

Sparsifier = Callable[[torch.Tensor, float, int, dict[str, float]], torch.Tensor]
CHUNK = 1 << 22
PIECE = 1 << 20  # entries at a time, where several copies of them are needed
SMALLEST_DENSITY = 2.0**-32  # the step of random numbers; far below, 1 / density is no fp32 number
SMALLEST_SIDE = 16  # of a matrix that is split into singular components


def kept_count(density: float, n: int) -> int:
    """How many of n entries a density keeps: rounded down, but one at least.

    >>> kept_count(0.2, 1000), kept_count(0.001, 32), kept_count(0.0, 32)
    (200, 1, 0)
    """
    return min(n, max(1, int(density * n))) if density > 0 and n else 0


def none(delta: torch.Tensor, density: float, key: int, numbers: dict[str, float]) -> torch.Tensor:
    """The delta as it is, of any shape."""
    return delta


def magnitude(
    delta: torch.Tensor, density: float, key: int, numbers: dict[str, float]
) -> torch.Tensor:
    """The largest entries by magnitude. Yadav et al. 2023 (TIES, arXiv 2306.01708), step 1.

    Of a delta of any shape.
    """
    kept = _largest(delta, kept_count(density, delta.numel()))
    return torch.where(kept.reshape(delta.shape), delta, 0.0)


def dare(delta: torch.Tensor, density: float, key: int, numbers: dict[str, float]) -> torch.Tensor:
    """Each entry kept with probability `density`, times 1 / density. Yu et al. 2023 (2311.03099).

    Of a delta of any shape.
    """
    if density < SMALLEST_DENSITY:
        return torch.zeros_like(delta)
    flat = delta.reshape(-1)
    out = torch.empty_like(flat)
    for start in range(0, len(flat), CHUNK):
        stop = min(len(flat), start + CHUNK)
        kept = _uniform(key, start, stop) < density
        out[start:stop] = flat[start:stop] * kept / density
    return out.reshape(delta.shape)


def della(delta: torch.Tensor, density: float, key: int, numbers: dict[str, float]) -> torch.Tensor:
    """Dropped with a probability that falls with the rank of the entry's magnitude in its row.

    p_i = p - epsilon / 2 + epsilon r_i / (n - 1), r_i = 0 for the largest of the row's n entries,
    p = 1 - density; survivors times 1 / (1 - p_i). Deep et al. 2024 (DELLA, arXiv 2406.11617), 3.1.
    `epsilon` is at most 2 min(p, density), so that probabilities stay probabilities. The delta may
    have any shape; its last dimension is a row.
    """
    if density <= 0:
        return torch.zeros_like(delta)
    rows = delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta.reshape(1, -1)
    n = rows.shape[1]
    epsilon = min(numbers.get("epsilon", 0.1), 2 * min(1 - density, density))
    places = torch.arange(n)
    out = torch.empty_like(rows)
    step = max(1, PIECE // max(1, n))  # rows at a time
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        order = part.abs().argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
        kept = density + epsilon / 2 - epsilon * rank.float() / max(1, n - 1)
        drawn = _uniform(key, start * n, start * n + part.numel()).reshape(part.shape)
        out[start : start + step] = part * (drawn < kept) / kept.clamp_min(1e-6)
    return out.reshape(delta.shape)


def breadcrumbs(
    delta: torch.Tensor, density: float, key: int, numbers: dict[str, float]
) -> torch.Tensor:
    """Neither the largest `gamma` of the entries nor the smallest; `density` of them are left.

    Of a delta of any shape. Davari and Belilovsky 2023 (Model Breadcrumbs, arXiv 2312.06795).
    """
    n = delta.numel()
    count = kept_count(density, n)
    outliers = min(int(numbers.get("gamma", 0.01) * n), n - count)
    kept = _largest(delta, outliers + count) & ~_largest(delta, outliers)
    return torch.where(kept.reshape(delta.shape), delta, 0.0)


def impart(
    delta: torch.Tensor, density: float, key: int, numbers: dict[str, float]
) -> torch.Tensor:
    """ImPart's importance-aware sparsity of singular vectors (arXiv 2504.13237, section 7.2).

    `density` is kept values of both factors / entries. A delta of any shape; what is no
    matrix, or a small one, stays as it is.
    """
    if delta.ndim != 2 or min(delta.shape) < SMALLEST_SIDE or density >= 1:
        return delta
    if density <= 0 or not delta.any():
        return torch.zeros_like(delta)
    o, i = delta.shape
    config: dict[str, Any] = {"value_dtype": "bf16"}
    config |= {name: numbers[name] for name in ("beta", "c") if name in numbers}
    codec = delta_codec("impart", config)
    rank = codec.components_for((o, i), density)
    factors = truncated_svd(DenseMatrix(delta), max(1, rank), key)
    spectrum = factors.s.double().numpy()
    settings = codec.settings_for((o, i), density, spectrum)
    settings, parts = codec.encode(DenseMatrix(delta), settings, key, factors)
    return torch.cat([rows for _, rows in codec.decode(parts, settings, (o, i), key)])


def _largest(delta: torch.Tensor, count: int) -> torch.Tensor:
    """Mask (n,) of the `count` largest of n entries by magnitude; of equal ones the first."""
    flat = delta.reshape(-1)
    n = flat.numel()
    if count >= n or count <= 0:
        return torch.full((n,), count > 0)
    edge, above = _edge(flat, count)
    left = count - above
    kept = torch.empty(n, dtype=torch.bool)
    for start in range(0, n, PIECE):
        size = _order(flat[start : start + PIECE])
        kept[start : start + PIECE] = size > edge
        equal = (size == edge).nonzero()[:left, 0]
        kept[start + equal] = True
        left -= len(equal)
    return kept


def _edge(flat: torch.Tensor, count: int) -> tuple[int, int]:
    """The place in order of the `count`-th largest magnitude, and how many are larger.

    Counted by the upper half of the bits, then by the lower half among those that share the upper:
    two passes that hold a piece each, where sorting or selecting holds several copies of all.
    """
    upper, above = _bin(flat, count, lambda size: size >> 16)
    lower, more = _bin(flat, count - above, lambda size: size[size >> 16 == upper] & 0xFFFF)
    return upper << 16 | lower, above + more


def _bin(
    flat: torch.Tensor, count: int, digits: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[int, int]:
    """The digit of the `count`-th largest, and how many have a larger digit."""
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for start in range(0, flat.numel(), PIECE):
        found = digits(_order(flat[start : start + PIECE]))
        histogram += torch.bincount(found, minlength=1 << 16)
    reached = histogram.flip(0).cumsum(0)  # how many have this digit or a larger one
    place = int(torch.searchsorted(reached, count))
    return (1 << 16) - 1 - place, int(reached[place - 1]) if place else 0


def _order(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of magnitudes: the bits of an fp32 number without its sign."""
    return values.float().abs().view(torch.int32)


def _uniform(key: int, start: int, stop: int) -> torch.Tensor:
    """Numbers in [0, 1) of the stream `key`."""
    return torch.from_numpy(random_u32(key, start, stop).astype(np.float64) * 2.0**-32)


SPARSIFIERS: dict[str, Sparsifier] = {
    "none": none,
    "magnitude": magnitude,
    "dare": dare,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "impart": impart,
}
