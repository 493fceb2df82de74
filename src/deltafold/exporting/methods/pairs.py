"""A delta as a pair of matrices, D ~ B A with B o x r and A r x i, sqrt(s) in both.

Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685); the truncated SVD is the best B A in the Frobenius
norm (Eckart and Young 1936). Whitened: with H = E[x x^T] = L L^T of the layer's inputs,

    E |D x - B A x|^2 = |(D - B A) L|_F^2,     D L = U s V^T,   B = U sqrt(s),  A = sqrt(s) V^T L^-1

is the best B A for outputs (Wang et al. 2024, arXiv 2403.07378).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix, Moments
from deltafold.running.devices import put

DAMPING = 0.01
"""Added to H in units of its mean diagonal, so that it has a root."""


@dataclass(frozen=True)
class Pair:
    """`b` (r x o, columns of B one after the other), `a` (r x i), fp32; `s` (r), descending.

    The first k rows of both are the best pair of rank k; `s` squared is what each component adds.
    """

    a: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor


def stored_pair(left: torch.Tensor, right: torch.Tensor) -> Pair:
    """The pair of factors that a codec stores: delta = left^T right, left (r, o), right (r, i).

    The two vectors of a component are made equal in length.
    """
    n, m = left.double().norm(dim=1), right.double().norm(dim=1)
    s = n * m
    keep = s > 0
    order = s[keep].argsort(descending=True, stable=True)
    root = s[keep][order].sqrt()
    b = left[keep][order].double() * (root / n[keep][order])[:, None]
    a = right[keep][order].double() * (root / m[keep][order])[:, None]
    return Pair(a.float(), b.float(), s[keep][order].float())


def svd_pair(delta: torch.Tensor, rank: int, key: int, moments: Moments | None = None) -> Pair:
    """The best pair of at most `rank` for an o x i delta (fp32); for outputs if moments are known."""
    delta = put(delta)
    root = None if moments is None else _root(moments)
    whitened = delta if root is None else delta @ root
    found = truncated_svd(DenseMatrix(whitened), rank, key)
    gains = found.s.double().sqrt()
    b = found.u.double() * gains
    a = found.v.double() * gains
    if root is not None:
        a = torch.linalg.solve_triangular(root.T.double(), a, upper=True)
    return Pair(a.T.float().contiguous().cpu(), b.T.float().contiguous().cpu(), found.s.cpu())


def _root(moments: Moments) -> torch.Tensor:
    """Lower triangular L (i x i, fp32) with L L^T = E[x x^T] / mean(diag) + damping I."""
    second = put(moments.second, torch.float64)
    second = torch.diag(second) if second.ndim == 1 else second
    mean = float(second.diagonal().mean())
    h = second / mean if mean > 0 else torch.zeros_like(second)
    h = h + DAMPING * torch.eye(len(h), dtype=torch.float64, device=h.device)
    return torch.linalg.cholesky(h).float()


def squared_error(delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """|D - B A|_F^2 of an o x i delta; `a` is r x i, `b` r x o, in any floating dtype."""
    total, wide, b = 0.0, put(a, torch.float32), put(b)
    step = max(1, (16 << 20) // (4 * delta.shape[1]))
    for start in range(0, len(delta), step):
        made = b[:, start : start + step].float().T @ wide
        gap = made.sub_(put(delta[start : start + step]))
        total += float(gap.square().sum(dtype=torch.float64))
    return total
