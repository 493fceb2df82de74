"""MKA: manifold of each state by a diffusion kernel, mutual information of the manifolds.

Liu et al. 2024, "Pruning via Merging" (arXiv 2406.16330). For a state X (n, w), one row a text:

    D_ij = |x_i - x_j|                                 of all rows, so that each one counts
    K = exp(-(D / sigma)^e)
    p = K 1;  K1 = K / (p p')^a                        a = 1/2: density normalised away
    v = (K1 1)^(1/2);  A = K1 / (v v')                 symmetric, largest eigenvalue 1
    E = eigenvectors 2 .. d+1 of A, divided by the first
    each column of E replaced by its ranks, in (0, 1)
    I(E_l, E_m) = mean over d x d pairs of columns of their mutual information
    S = I / sqrt(H_l H_m)                              NPIB

After ranking, differential entropies H are not positive, and S is not bounded by 1; so it cannot be
the ratio of a merge. Mode `paper` normalises by Linfoot's coefficient instead, which lies in [0, 1):
S = sqrt(1 - exp(-2 I)), for Gaussians the absolute correlation. Mode `reference` keeps the quotient
(of the entropies' sizes), with the released program's kernel.
"""

from __future__ import annotations

from typing import Literal

import torch

Mode = Literal["paper", "reference"]

DIMENSIONS = 2
EXPONENT = 0.5
REFERENCE_SIGMA = 8.0
NEIGHBOURS = 5
ENTROPY_NEIGHBOURS = 50


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (n, n) of rows (n, w), exact zeros on the diagonal."""
    rows = rows.double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(0)


def median_distance(gaps: torch.Tensor) -> float:
    """The median of the distances (n, n) of two different rows; 1 where all rows are equal."""
    above = gaps[tuple(torch.triu_indices(len(gaps), len(gaps), offset=1))]
    return float(above.median()) or 1.0 if above.numel() else 1.0


def diffusion_matrix(
    rows: torch.Tensor, sigma: float | None = None, exponent: float = EXPONENT
) -> torch.Tensor:
    """The symmetric diffusion operator A (n, n) of rows (n, w). `sigma` None: the median distance."""
    gaps = distances(rows)
    scale = median_distance(gaps) if sigma is None else sigma
    kernel = torch.exp(-((gaps / scale) ** exponent))
    density = kernel.sum(1)
    kernel = kernel / (density[:, None] * density[None]).sqrt()
    degree = kernel.sum(1).sqrt()
    return kernel / (degree[:, None] * degree[None])


def embedding(
    rows: torch.Tensor,
    dimensions: int = DIMENSIONS,
    sigma: float | None = None,
    exponent: float = EXPONENT,
) -> torch.Tensor:
    """Manifold coordinates E (n, d) of rows (n, w), each column with its largest entry positive."""
    _, vectors = torch.linalg.eigh(diffusion_matrix(rows, sigma, exponent))
    first = vectors[:, -1:]
    chosen = vectors[:, -dimensions - 1 : -1].flip(1) / first
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    return chosen * torch.where(largest < 0, -1.0, 1.0)


def ranks(columns: torch.Tensor) -> torch.Tensor:
    """Each column (n, d) as ranks in (0, 1): (rank + 1/2) / n, ties by order."""
    order = columns.argsort(dim=0, stable=True).argsort(dim=0, stable=True)
    return (order.double() + 0.5) / len(columns)


def gaps_of(columns: torch.Tensor) -> torch.Tensor:
    """|difference| (d, n, n) of the entries of each column (n, d)."""
    turned = columns.double().T
    return (turned[:, :, None] - turned[:, None]).abs()


def mutual_information(x: torch.Tensor, y: torch.Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Mutual information of two columns in nats, by nearest neighbours, at least 0.

    `x` and `y` (n, n) are their gaps (`gaps_of`). Kraskov et al. 2004 (cond-mat/0305641), eq. 8:
    psi(k) + psi(n) - <psi(m_x + 1) + psi(m_y + 1)>, with m_x rows nearer in x than the k-th
    neighbour in the plane (maximum norm).
    """
    n = len(x)
    k = max(1, min(neighbours, n - 1))
    both = torch.maximum(x, y)
    reach = both.kthvalue(k + 1, dim=1).values  # the nearest row is the row itself
    # The row itself is counted too: that is the +1.
    near = [(gaps < reach[:, None]).sum(1).clamp_min(1).double() for gaps in (x, y)]
    found = torch.digamma(torch.tensor([k, n], dtype=torch.float64)).sum()
    found = found - sum(torch.digamma(each).mean() for each in near)
    return max(0.0, float(found))


def entropy(
    columns: torch.Tensor, neighbours: int = ENTROPY_NEIGHBOURS, volume: bool = False
) -> float:
    """Differential entropy (nats) of rows (n, d), by nearest neighbours.

    Kozachenko and Leonenko 1987: psi(n) - psi(k) + d <log r_k> (+ log of the unit ball's volume).
    The released program leaves the volume out, which shifts every entropy alike.
    """
    n, d = columns.shape
    k = max(1, min(neighbours, n - 1))
    reach = distances(columns).kthvalue(k + 1, dim=1).values.clamp_min(1e-12)
    found = torch.digamma(torch.tensor(float(n))) - torch.digamma(torch.tensor(float(k)))
    found = found + d * reach.log().mean()
    if volume:
        half = torch.tensor(d / 2.0)
        found = found + half * torch.log(torch.tensor(torch.pi)) - torch.lgamma(half + 1)
    return float(found)


def embeddings(states: torch.Tensor, mode: Mode = "paper") -> torch.Tensor:
    """Ranked manifold coordinates (s, n, d) of states (s, n, w)."""
    sigma = REFERENCE_SIGMA if mode == "reference" else None
    return torch.stack([ranks(embedding(rows, sigma=sigma)) for rows in states])


def npib(states: torch.Tensor, mode: Mode = "paper") -> torch.Tensor:
    """The matrix S (s, s) of states (s, n, w). Raises ValueError for fewer than 4 rows."""
    if states.shape[1] < 4:
        raise ValueError(f"a manifold needs at least 4 rows, not {states.shape[1]}")
    points = embeddings(states, mode)
    gaps = [gaps_of(each) for each in points]
    sizes = [abs(entropy(each)) for each in points] if mode == "reference" else []
    out = torch.ones(len(states), len(states), dtype=torch.float64)
    for i in range(len(states)):
        for j in range(i, len(states)):
            pairs = [mutual_information(x, y) for x in gaps[i] for y in gaps[j]]
            found = torch.tensor(sum(pairs) / len(pairs), dtype=torch.float64)
            if mode == "paper":
                found = torch.sqrt(1 - torch.exp(-2 * found))
            else:
                found = found / max((sizes[i] * sizes[j]) ** 0.5, 1e-12)
            out[i, j] = out[j, i] = found
    return out


def reference_ratio(alike: torch.Tensor, lower: int, upper: int) -> float:
    """The released program's merge ratio: sigmoid(s_l / (s_l + s_m)), s the row means of S (n, n).

    It lies between 0.5 and 0.731, whatever the blocks.
    """
    means = alike.mean(1)
    share = means[lower] / (means[lower] + means[upper])
    return float(torch.sigmoid(share))
