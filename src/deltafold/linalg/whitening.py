"""Low-rank factors of a matrix that change its outputs least, given what its inputs look like.

    min over rank r of  E |W x - B A x|^2  =  |(W - B A) L|_F^2,   G = E[x x^T] = L L^T

The minimum is the truncated SVD of W L: with Q its r leading left singular vectors, B = Q and
A = Q^T W. Q are also the leading eigenvectors of W G W^T, the principal components of the outputs
(LoRD, arXiv 2309.14021), so nothing is ever divided by L, and a G without full rank does no harm.
Without G it is the plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltafold.lazy import torch
from deltafold.linalg import DAMPING
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix
from deltafold.running.devices import put

MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Whitened:
    """W ~ Q A with orthonormal Q; float64. `s` are the singular values of W L, descending.

    The first k columns of Q and rows of A are the best of rank k.
    """

    q: torch.Tensor  # o x r
    a: torch.Tensor  # r x i
    s: torch.Tensor  # r, fewer where W L has no more


def input_root(second: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """L (i x i, lower triangular, float64) with L L^T = G + damping mean(diag G) I.

    Of a diagonal G (i,) the root of its entries. Where rounding has made G indefinite, damping grows
    tenfold until the factor exists. Raises ValueError for a G that is no second moment.
    """
    g = second.double()
    diagonal = g if g.ndim == 1 else g.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:  # no input at all: every direction counts alike
        return torch.ones_like(g) if g.ndim == 1 else _eye(g)
    if g.ndim == 1:
        return (g.clamp_min(0) + damping * mean).sqrt()
    while damping <= MOST_DAMPING:
        made, failed = torch.linalg.cholesky_ex(g + damping * mean * _eye(g))
        if not int(failed):
            return made
        damping = max(10 * damping, 1e-12)
    raise ValueError("the second moment of the inputs is not positive")


def _eye(g: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(g), dtype=g.dtype, device=g.device)


def apply_root(matrix: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """W L (o x i, float64); W where no inputs are known."""
    wide = matrix.double()
    if root is None:
        return wide
    return wide * root if root.ndim == 1 else wide @ root


def whitened_svd(
    matrix: torch.Tensor,
    second: torch.Tensor | None,
    rank: int,
    key: int,
    damping: float = DAMPING,
) -> Whitened:
    """The best factors of an o x i matrix for inputs with the second moment G.

    `second` is G (i x i), its diagonal (i,), or None for the plain SVD. `key` seeds the randomised
    route of `truncated_svd`, which is taken where few components of a large matrix are wanted.
    Where W L has less than `rank` components, those of what is left of W follow, so that the full
    rank always gives W; after them zeros. The factors lie where the matrix does.
    """
    rank, home = min(rank, *matrix.shape), matrix.device
    matrix = put(matrix)
    root = None if second is None else input_root(put(second), damping)
    found = truncated_svd(DenseMatrix(apply_root(matrix, root)), rank, key)
    wide = matrix.double()
    q = _orthonormal(found.u.double())
    if found.rank < rank:
        rest = truncated_svd(DenseMatrix(wide - q @ (q.T @ wide)), rank - found.rank, key)
        q = _orthonormal(torch.cat([q, rest.u.double()], dim=1))
    if q.shape[1] < rank:
        q = torch.nn.functional.pad(q, (0, rank - q.shape[1]))
    return Whitened(q.to(home), (q.T @ wide).to(home), found.s.double().to(home))


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """The columns made orthonormal to working precision, one after the other, signs kept."""
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def output_error(
    matrix: torch.Tensor, made: torch.Tensor, second: torch.Tensor | None
) -> tuple[float, float]:
    """(E |W x - W' x|^2, E |W x|^2) of W and W' (o, i), G (i, i) or (i,).

    Without G the squared norms of the matrices themselves.
    """
    return _energy(matrix.double() - made.double(), second), _energy(matrix.double(), second)


def _energy(matrix: torch.Tensor, second: torch.Tensor | None) -> float:
    if second is None:
        return float(matrix.square().sum())
    g = second.double()
    return float((matrix * (matrix * g if g.ndim == 1 else matrix @ g)).sum())
