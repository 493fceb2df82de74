"""What training starts from: factors of the difference between a matrix and its anchor's.

    svd         the best in weight space: truncated SVD of W - W_anchor
    activation  the best in the layer's outputs: the same, whitened by the layer's inputs
    zero        B = 0, A random: the anchor's matrix as it is

B and A share the singular values evenly (balanced), so that both learn at one pace. Without an anchor
W_anchor is nothing. With scales it is diag(s) W_anchor, and s and the factors are found in turns: s row
for row the least squares of what the factors leave, beginning with factors alone. It is almost nothing
where W and its anchor have nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltafold.coding.counter import derive_key, gaussian
from deltafold.linalg.whitening import whitened_svd

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (rank, in), B (rows, rank), fp32."""


def least_scale(
    weight: torch.Tensor, anchor: torch.Tensor, second: torch.Tensor | None
) -> torch.Tensor:
    """s (out,) for which diag(s) `anchor` is nearest to `weight`, both (out, in), in their outputs.

    s_o = w_o^T G a_o / a_o^T G a_o, G = `second`: E[x x^T] or its diagonal; None: the weights alone.
    """
    seen = anchor
    if second is not None:
        seen = anchor * second if second.ndim == 1 else anchor @ second
    return (weight * seen).sum(1) / (anchor * seen).sum(1).clamp_min(1e-30)


def svd(
    difference: torch.Tensor, rank: int, second: torch.Tensor | None, name: str, seed: int
) -> Factors:
    """`difference` (rows, in); `second` E[x x^T] of the inputs is not used."""
    return _balanced(difference, rank, None, name, seed)


def activation(
    difference: torch.Tensor, rank: int, second: torch.Tensor | None, name: str, seed: int
) -> Factors:
    """`second` is (in, in), its diagonal (in,), or None where the inputs are not known."""
    return _balanced(difference, rank, second, name, seed)


def zero(
    difference: torch.Tensor, rank: int, second: torch.Tensor | None, name: str, seed: int
) -> Factors:
    """A (rank, in) drawn from a normal distribution of variance 1 / in, B (rows, rank) zero.

    So nothing is added at the start.
    """
    rows, columns = difference.shape
    drawn = gaussian(derive_key(seed, name, "start"), rank, columns) / columns**0.5
    return torch.from_numpy(drawn).float(), torch.zeros(rows, rank)


def _balanced(
    difference: torch.Tensor, rank: int, second: torch.Tensor | None, name: str, seed: int
) -> Factors:
    found = whitened_svd(difference, second, rank, derive_key(seed, name, "start"))
    root = found.a.norm(dim=1).sqrt()
    a = found.a / root.clamp_min(1e-30)[:, None]
    return a.float().contiguous(), (found.q * root).float().contiguous()


INITIALISATIONS: dict[
    str, Callable[[torch.Tensor, int, torch.Tensor | None, str, int], Factors]
] = {"svd": svd, "activation": activation, "zero": zero}
