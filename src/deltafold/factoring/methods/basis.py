"""Basis Sharing (arXiv 2410.03765): matrices of several blocks in one basis, with own coefficients.

    [W_1^T | ... | W_n^T]  ~  A^T [B_1^T | ... | B_n^T]        inputs x n outputs,  rank k
    W_j ~ B_j A            A (k x i) shared, B_j (o x k) a block's own

The paper takes the SVD of S W with S the Cholesky factor of the blocks' summed input Gram, and the
basis S^-1 U_k s_k; with Q the leading right singular vectors that is A = Q^T [W_1; ..; W_n], without
dividing by S. A group of one block is LoRD. The refit gives each block the coefficients that are best
for its own inputs: B_j = W_j G_j A^T (A G_j A^T)^-1; it can only lower the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafold.linalg.whitening import DAMPING, whitened_svd

_RIDGE = 1e-10


def shared_basis(
    weights: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor | None],
    rank: int,
    key: int,
    damping: float = DAMPING,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A (k x i) and each B_j (o_j x k) of matrices W_j (o_j x i); Grams (i x i) or diagonals."""
    made = whitened_svd(torch.cat(list(weights)), summed(grams), rank, key, damping)
    return made.a, list(made.q.split([len(weight) for weight in weights]))


def summed(grams: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The sum of Grams (i, i), or of diagonals (i,) where one is only that; None where one is unknown."""
    known = [gram for gram in grams if gram is not None]
    if not known or len(known) < len(grams):
        return None
    if any(gram.ndim == 1 for gram in known):
        known = [gram if gram.ndim == 1 else gram.diagonal() for gram in known]
    return torch.stack([gram.double() for gram in known]).sum(0)


def refit(weight: torch.Tensor, a: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """The coefficients B (o x k) that are best for a basis A (k x i) and inputs of this Gram."""
    wide, a = weight.double(), a.double()
    turned = a if gram is None else a * gram.double() if gram.ndim == 1 else a @ gram.double()
    inner = turned @ a.T  # A G A^T
    ridge = _RIDGE * inner.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(len(inner), dtype=torch.float64, device=inner.device)
    return torch.linalg.solve(inner + ridge * eye, turned @ wide.T).T


def neighbours(blocks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Groups of `size` blocks in a row; the last one may be smaller.

    >>> neighbours([0, 1, 2, 3, 4], 2)
    [(0, 1), (2, 3), (4,)]
    """
    return [tuple(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def likeness(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine of two Grams (i, i) or diagonals (i,): 1 where inputs vary in the same directions."""
    if first.ndim != second.ndim:
        first, second = (g if g.ndim == 1 else g.diagonal() for g in (first, second))
    one, two = first.double().flatten(), second.double().flatten()
    return float(one @ two / (one.norm() * two.norm()).clamp_min(1e-300))


def alike(blocks: Sequence[int], cosines: torch.Tensor, size: int) -> list[tuple[int, ...]]:
    """Groups of `size` blocks with like inputs; `cosines` (n, n) in the order of `blocks`.

    The closest pair first; then to each group, until it is full, what is closest to its members.
    """
    free, groups = list(range(len(blocks))), []
    while free:
        pairs = [(-float(cosines[a, b]), a, b) for a in free for b in free if a < b]
        group = list(min(pairs)[1:]) if pairs and size > 1 else free[:1]
        free = [each for each in free if each not in group]
        while len(group) < size and free:
            near = min(free, key=lambda each: (-float(cosines[each, group].mean()), each))
            group.append(near)
            free.remove(near)
        groups.append(tuple(blocks[each] for each in sorted(group)))
    return sorted(groups)
