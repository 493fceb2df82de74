"""Factors of one matrix: W ~ B A, plain or for its inputs, with a bias for the mean of the outputs.

plain      truncated SVD of W
whitened   truncated SVD of W L, G = L L^T = E[x x^T]                    LoRD (arXiv 2309.14021)
centred    the same of the covariance G - mu mu^T, and a bias (W - B A) mu: the mean is exact
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltafold.linalg.matrices import Moments


@dataclass(frozen=True)
class Factored:
    """W (o x i) ~ B A, with B o x r and A r x i; `bias` (o) is added to the layer's own."""

    b: torch.Tensor
    a: torch.Tensor
    bias: torch.Tensor | None = None


def covariance(moments: Moments) -> torch.Tensor:
    """E[x x^T] - mu mu^T (i, i), or its diagonal (i,); float64."""
    mean = moments.mean.double()
    if moments.second.ndim == 1:
        return (moments.second.double() - mean.square()).clamp_min(0)
    return moments.second.double() - torch.outer(mean, mean)


def input_gram(moments: Moments | None, centred: bool) -> torch.Tensor | None:
    """What inputs look like to the methods: G, or the covariance, (i, i) or (i,); None: not known."""
    if moments is None:
        return None
    return covariance(moments) if centred else moments.second.double()


def with_bias(weight: torch.Tensor, made: Factored, moments: Moments | None) -> Factored:
    """The factors of W (o, i) with the bias that makes the mean of the outputs exact: (W - B A) mu."""
    if moments is None:
        return made
    lost = weight.double() - made.b.double() @ made.a.double()
    return Factored(made.b, made.a, lost @ moments.mean.double())
