"""Truncated singular value decomposition of a delta, by the cheapest route that is good enough.

Never a full SVD: either the eigenvectors of the smaller Gram matrix (exact enough to truncate, about
five times faster), or, when few components are wanted, a randomised range finder (Halko, Martinsson
and Tropp 2011) with oversampling 32 and 4 power steps, whose error stays within 1 % of the optimum.
Both read the matrix in chunks of rows, so that a tall matrix (an embedding) is never held whole.

Float64 inside: its rounding noise lies far below the 16 bits in which factors are stored, which is
what makes stored bytes agree between machines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from deltafold.coding.counter import gaussian

OVERSAMPLING = 32
POWER_STEPS = 4
SMALL_SIDE = 1024  # up to here the Gram matrix is decomposed in less time than passes over D take
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Fisher:
    """What an error in each entry (r, j) of an o x i matrix costs: rows[r] columns[j] error^2.

    A diagonal of the Fisher information in its Kronecker-factored form (Martens and Grosse 2015,
    arXiv 1503.05671): for y = W x, `columns` is E[x_j^2] (i) and `rows` is E[(dL/dy_r)^2] (o), with
    L the log probability that the model gives to its own prediction. fp32, all finite, >= 0.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def mean(self) -> float:
        """Mean over all entries."""
        return float(self.rows.double().mean() * self.columns.double().mean())


class RowMatrix(Protocol):
    """A matrix (o x i) that gives its rows in fp32 when asked."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def fisher(self) -> Fisher | None:
        """What errors cost; None where that is not known."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor: ...

    def settle(self, start: int, change: torch.Tensor) -> torch.Tensor:
        """What is left of a change of the rows from `start` on, once it is added and rounded.

        The restored weight is base + change in the stored dtype; this is that, minus the base.
        """
        ...


@dataclass(frozen=True)
class DenseMatrix:
    """A `RowMatrix` held in memory."""

    values: torch.Tensor
    fisher: Fisher | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.values[start:stop]

    def settle(self, start: int, change: torch.Tensor) -> torch.Tensor:
        """All of it: there is no base, and no rounding."""
        return change


@dataclass(frozen=True)
class Factors:
    """D ~ U diag(s) V^T with `rank` columns; float32, s descending."""

    u: torch.Tensor  # o x r
    s: torch.Tensor  # r
    v: torch.Tensor  # i x r

    @property
    def rank(self) -> int:
        return len(self.s)


@dataclass(frozen=True)
class Moments:
    """What calibration knows of a layer's inputs x (i values), over `tokens` tokens.

    `second` is E[x x^T], i x i, or only its diagonal, i; fp32. `mean` is E[x], i.
    """

    second: torch.Tensor
    mean: torch.Tensor
    tokens: int

    @property
    def diagonal(self) -> torch.Tensor:
        """E[x_j^2], i."""
        return self.second if self.second.ndim == 1 else self.second.diagonal()


def chunks(matrix: RowMatrix, columns_held: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) in pieces of about `CHUNK_BYTES`, counting `columns_held` results a row."""
    o, i = matrix.shape
    step = max(1, CHUNK_BYTES // (8 * max(1, i + columns_held)))
    for start in range(0, o, step):
        yield start, matrix.rows(start, min(o, start + step))


def is_randomised(shape: tuple[int, int], rank: int) -> bool:
    """True if `truncated_svd` takes the randomised route for this shape and rank."""
    return min(shape) > SMALL_SIDE and (rank + OVERSAMPLING) * 4 <= min(shape)


def svd_memory_bytes(shape: tuple[int, int], rank: int) -> int:
    """Peak memory of `truncated_svd` beside the matrix itself."""
    o, i = shape
    if is_randomised(shape, rank):
        return 8 * (rank + OVERSAMPLING) * 2 * (o + i) + 4 * CHUNK_BYTES
    return 5 * 8 * min(shape) ** 2 + 12 * rank * (o + i) + 4 * CHUNK_BYTES


def truncated_svd(matrix: RowMatrix, rank: int, key: int) -> Factors:
    """The `rank` leading singular triplets of an o x i matrix. `key` seeds the randomised route.

    Signs are fixed (the largest entry of each column of V is positive), so that the result is one.
    Components whose singular value is zero to working precision are left out.
    """
    o, i = matrix.shape
    rank = min(rank, o, i)
    if is_randomised((o, i), rank):
        u, s, v = _randomised(matrix, rank, key)
    elif o >= i:
        u, s, v = _tall_gram(matrix, rank)
    else:
        u, s, v = _wide_gram(matrix, rank)
    keep = s > s[0] * 1e-7 if len(s) and float(s[0]) > 0 else torch.zeros(len(s), dtype=torch.bool)
    u, s, v = u[:, keep], s[keep], v[:, keep]
    sign = torch.ones(len(s), dtype=torch.float64)
    if len(s):
        peak = v.abs().argmax(dim=0)
        sign = torch.where(v[peak, torch.arange(len(s))] < 0, -1.0, 1.0).to(torch.float64)
    return Factors((u * sign.to(u.dtype)).float(), s.float(), (v * sign.to(v.dtype)).float())


Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _eigh_descending(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank].contiguous()


def _project(matrix: RowMatrix, right: torch.Tensor) -> torch.Tensor:
    """D right, in float64, a chunk of rows at a time. right: i x r -> o x r."""
    out = torch.empty(matrix.shape[0], right.shape[1], dtype=torch.float64)
    for start, rows in chunks(matrix, right.shape[1]):
        torch.mm(rows.double(), right, out=out[start : start + len(rows)])
    return out


def _project_back(matrix: RowMatrix, left: torch.Tensor) -> torch.Tensor:
    """D^T left, in float64. left: o x r -> i x r."""
    out = torch.zeros(matrix.shape[1], left.shape[1], dtype=torch.float64)
    for start, rows in chunks(matrix, left.shape[1]):
        out.addmm_(rows.double().T, left[start : start + len(rows)])
    return out


def _tall_gram(matrix: RowMatrix, rank: int) -> Triplets:
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for _, rows in chunks(matrix):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    s, v = _eigh_descending(gram, rank)
    del gram
    u = torch.empty(matrix.shape[0], len(s), dtype=torch.float32)  # float32: o can be a vocabulary
    scaled = v / s.clamp_min(1e-300)
    for start, rows in chunks(matrix, len(s)):
        u[start : start + len(rows)] = (rows.double() @ scaled).float()
    return u, s, v


def _wide_gram(matrix: RowMatrix, rank: int) -> Triplets:
    o = matrix.shape[0]
    gram = torch.empty(o, o, dtype=torch.float64)
    held = matrix.rows(0, o)
    for start in range(0, o, step := max(1, CHUNK_BYTES // (8 * matrix.shape[1]))):
        left = held[start : start + step].double()
        for begin in range(0, start + len(left), step):
            block = left @ held[begin : begin + step].double().T
            gram[start : start + len(left), begin : begin + block.shape[1]] = block
            gram[begin : begin + block.shape[1], start : start + len(left)] = block.T
    s, u = _eigh_descending(gram, rank)
    del gram, held
    return u, s, _project_back(matrix, u / s.clamp_min(1e-300))


def _randomised(matrix: RowMatrix, rank: int, key: int) -> Triplets:
    width = min(rank + OVERSAMPLING, *matrix.shape)
    sketch = torch.from_numpy(gaussian(key, matrix.shape[1], width))
    for _ in range(POWER_STEPS):
        left = torch.linalg.qr(_project(matrix, sketch)).Q
        sketch = torch.linalg.qr(_project_back(matrix, left)).Q
    left = torch.linalg.qr(_project(matrix, sketch)).Q
    back = _project_back(matrix, left)  # i x width; D ~ left back^T
    s, small = _eigh_descending(back.T @ back, rank)
    return left @ small, s, back @ small / s.clamp_min(1e-300)


_FEED_COLUMNS = 96


def feeding_factor(moments: Moments, damping: float) -> torch.Tensor:
    """Upper triangular U (i x i, fp32) with U^T U = H^-1, H = E[x x^T] / mean(diag) + damping I."""
    second = moments.second.double()
    mean = float(second.diagonal().mean())
    h = second / mean if mean > 0 else torch.zeros_like(second)
    h = h + damping * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()


def feed_forward(
    values: torch.Tensor,
    factor: torch.Tensor,
    rounded: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Round the columns of an m x i matrix one after the other, each error fed to those that follow.

    `rounded(column, j)` gives the codes of column j, and the values that they stand for. Returns the
    codes. Source: Frantar et al. 2022 (arXiv 2210.17323), with lazy
    updates of blocks of columns.
    """
    left, out = values.clone(), torch.empty_like(values)
    i = values.shape[1]
    for first in range(0, i, _FEED_COLUMNS):
        last = min(i, first + _FEED_COLUMNS)
        block = left[:, first:last].T.contiguous()  # rows are columns: contiguous in memory
        errors = torch.empty_like(block)
        for j in range(last - first):
            at = first + j
            out[:, at], value = rounded(block[j], at)
            errors[j] = (block[j] - value) / factor[at, at]
            if j + 1 < last - first:
                block[j + 1 :].addr_(factor[at, at + 1 : last], errors[j], alpha=-1)
        left[:, last:].addmm_(errors.T, factor[first:last, last:], alpha=-1)
    return out


def noise_edge(shape: tuple[int, int], squared_norm: float) -> float:
    """Largest singular value to expect of a matrix of independent noise with this squared norm.

    The Marchenko-Pastur edge sigma (sqrt(o) + sqrt(i)), with sigma^2 = squared_norm / (o i). A delta
    none of whose singular values rises above it has a flat spectrum: no low-rank part to keep.
    """
    o, i = shape
    return float(np.sqrt(squared_norm / max(1, o * i)) * (np.sqrt(o) + np.sqrt(i)))


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Matrix products of fp32 by `torch.set_float32_matmul_precision`, inside; for all threads."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
