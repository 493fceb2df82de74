"""How alike the hidden states between blocks are: one function a row of `SIMILARITIES`.

    h_0 -> block 0 -> h_1 -> block 1 -> h_2 -> ... -> h_n

Every similarity gives a matrix A (n+1, n+1) over the states, higher where they are more alike. It
answers all questions that are asked of blocks: A[i, i+1] is how little block i does, A[l, l+m] how
little the m blocks from l on do, A[i+1, i+2] how alike the outputs of the pair (i, i+1) are.

States are (s, n, w): s states, n rows, w the width of the model. Rows are real tokens, never
padding: all of them (`tokens`), or one or some of each sample (`samples`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from deltafold.folding.methods.mka import npib

Rows = Literal["tokens", "samples"]


@dataclass(frozen=True)
class Similarity:
    """A row of the table. `ratio` says that values lie in [0, 1] and may serve as merge ratios.

    With `tokens` the matrix is a mean over rows, so that parts of the rows may be averaged.
    """

    matrix: Callable[[torch.Tensor], torch.Tensor]
    rows: Rows = "samples"
    ratio: bool = True
    paper: str = ""


def cosines(states: torch.Tensor) -> torch.Tensor:
    """Cosines (s, s, n) of the rows of each two states (s, n, w); 1 where both rows are zero.

    A zero row has no direction: against any other row its cosine is 0.
    """
    states = states.double()
    norms = states.norm(dim=-1)
    dots = torch.einsum("inw,jnw->ijn", states, states)
    scale = norms[:, None] * norms[None]
    both_zero = (norms[:, None] == 0) & (norms[None] == 0)
    found = torch.where(scale > 0, dots / scale.clamp_min(1e-300), 0.0)
    return torch.where(both_zero, 1.0, found).clamp(-1, 1)


def cosine(states: torch.Tensor) -> torch.Tensor:
    """Mean cosine over rows; 1 - A[i, i+1] is block influence, ShortGPT (arXiv 2403.03853), eq. 1.

    BI_i = 1 - E_t [ x_i,t . x_i+1,t / (|x_i,t| |x_i+1,t|) ], a dot product for each row.
    """
    return cosines(states).mean(-1)


def angular(states: torch.Tensor) -> torch.Tensor:
    """1 - d with d(l, l+m) = arccos(cos(h_l, h_l+m)) / pi, at the last token.

    Gromov et al. 2024 (arXiv 2403.17887), eq. 6. State 0 is what enters the first block.
    """
    return 1 - torch.arccos(cosines(states)).mean(-1) / torch.pi


def cka(states: torch.Tensor) -> torch.Tensor:
    """Linear CKA: |Y'X|^2 / (|X'X| |Y'Y|) of centred rows. Kornblith et al. 2019 (1905.00414), eq. 3.

    By Gram matrices n x n: |Y'X|^2 = <XX', YY'>.
    """
    centred = states.double() - states.double().mean(1, keepdim=True)
    grams = (centred @ centred.transpose(1, 2)).flatten(1)
    return _correlations(grams @ grams.T)


def euclidean(states: torch.Tensor) -> torch.Tensor:
    """Mean over rows of 1 - |x - y| / (|x| + |y|): 1 for equal rows, 0 for opposite ones.

    A matrix (s, s) of states (s, n, w).
    """
    states = states.double()
    norms = states.norm(dim=-1)
    out = torch.ones(len(states), len(states), dtype=torch.float64)
    for i in range(len(states)):
        gaps = (states - states[i]).norm(dim=-1)
        out[i] = 1 - (gaps / (norms + norms[i]).clamp_min(1e-300)).mean(-1)
    return out


def mahalanobis(states: torch.Tensor) -> torch.Tensor:
    """Mean over rows of 1 / (1 + d), d^2 = (x - y)' C^-1 (x - y) / w.

    A matrix (s, s) of states (s, n, w). C is the covariance within states, pooled over all of them,
    with a hundredth of its mean variance added to the diagonal: there may be fewer rows than
    dimensions. Mahalanobis 1936.
    """
    states = states.double()
    width = states.shape[-1]
    centred = (states - states.mean(1, keepdim=True)).flatten(0, 1)
    covariance = centred.T @ centred / max(1, len(centred) - len(states))
    spread = covariance.diagonal().mean().clamp_min(1e-12)
    factor = torch.linalg.cholesky(covariance + 0.01 * spread * torch.eye(width).double())
    white = torch.linalg.solve_triangular(factor, states.flatten(0, 1).T, upper=False)
    white = white.T.reshape(states.shape)
    out = torch.ones(len(states), len(states), dtype=torch.float64)
    for i in range(len(states)):
        gaps = (white - white[i]).norm(dim=-1) / width**0.5
        out[i] = (1 / (1 + gaps)).mean(-1)
    return out


def absence(states: torch.Tensor) -> torch.Tensor:
    """No matrix of states (s, n, w): what a model without a block predicts is measured instead."""
    raise ValueError("what an absence costs is measured on the model, not on its states")


def _correlations(gram: torch.Tensor) -> torch.Tensor:
    """<a, b> / (|a| |b|) from the matrix of dot products; 1 on the diagonal."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = (norms[:, None] * norms[None]).clamp_min(1e-300)
    return (gram / scale).fill_diagonal_(1.0)


SIMILARITIES: dict[str, Similarity] = {
    "cosine": Similarity(cosine, "tokens", paper="2403.03853"),
    "angular": Similarity(angular, paper="2403.17887"),
    "cka": Similarity(cka, paper="1905.00414"),
    "npib": Similarity(npib, paper="2406.16330"),
    "npib-reference": Similarity(
        lambda states: npib(states, mode="reference"), ratio=False, paper="2406.16330"
    ),
    "euclidean": Similarity(euclidean),
    "mahalanobis": Similarity(mahalanobis),
    "perplexity": Similarity(absence, ratio=False, paper="2402.09025"),
    "kl": Similarity(absence, ratio=False),
}
ABSENCES = {"perplexity": "nll", "kl": "kl"}
"""Rows that measure absences, and what they measure: against the text, or the model's own words."""
