"""Matrices by rows, what calibration knows of a layer, and errors fed forward.

What is decomposed is in `linalg/decomposition.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from deltafold.lazy import torch
from deltafold.running.devices import put

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

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows (stop - start, i), fp32."""
        ...

    def settle(self, start: int, change: torch.Tensor) -> torch.Tensor:
        """What is left of a change (n, i) of the rows from `start` on, once it is added and rounded.

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
        """Rows (stop - start, i), fp32."""
        return self.values[start:stop]

    def settle(self, start: int, change: torch.Tensor) -> torch.Tensor:
        """All of the change (n, i): there is no base, and no rounding."""
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
        """E[x_j^2], (i,)."""
        return self.second if self.second.ndim == 1 else self.second.diagonal()


def chunks(
    matrix: RowMatrix, columns_held: int = 0, room: int = CHUNK_BYTES
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows (n, i)): about `room` bytes at a time, counting `columns_held` results a row."""
    o, i = matrix.shape
    step = rows_at_once(i + columns_held, room)
    for start in range(0, o, step):
        yield start, matrix.rows(start, min(o, start + step))


def rows_at_once(columns: int, room: int) -> int:
    """Rows of so many fp64 values that take at most about `room` bytes; at least one."""
    return max(1, room // (8 * max(1, columns)))


_FEED_COLUMNS = 96


def feeding_factor(moments: Moments, damping: float) -> torch.Tensor:
    """Upper triangular U (i x i, fp32) with U^T U = H^-1, H = E[x x^T] / mean(diag) + damping I."""
    second = put(moments.second, torch.float64)
    mean = float(second.diagonal().mean())
    h = second / mean if mean > 0 else torch.zeros_like(second)
    h = h + damping * torch.eye(len(h), dtype=torch.float64, device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float().to(moments.second.device)


def feed_forward(
    values: torch.Tensor,
    factor: torch.Tensor,
    rounded: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Round the columns of an m x i matrix one after the other, each error fed to those that follow.

    `rounded(column, j)` gives the codes (m,) of column j, and the values (m,) that they stand for;
    `factor` (i, i) is upper triangular. Returns the codes (m, i). Source: Frantar et al. 2022 (arXiv
    2210.17323), with lazy updates of blocks of columns.

    `coding/gptq` does the same with grids and a mask, in fp64 on the CPU, and adds up the errors of
    a block in one product. The two round differently, and archives hold what each of them gives, so
    they stay two.
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


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Matrix products of fp32 by `torch.set_float32_matmul_precision`, inside; for all threads."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
