"""`impart`: importance-aware sparsification of the delta's singular vectors.

Source: "ImPart: Importance-Aware Delta-Sparsification for Improved Model Compression and Merging in
LLMs" (ACL 2025, arXiv 2504.13237), Algorithm 1. D = U diag(s) V^T of an o x i matrix, R = min(o, i):

    alpha = 1 - o i share / (R (o + i))          sparsity of U and V at which kept values = o i share
    k     = int(R (1 - beta))                    the last fraction beta of components is dropped
    gamma = (alpha - beta) / (1 - beta)          mean sparsity needed on those that stay
    p_j   = (1 - (s_j / s_1)^C) gamma            the larger s_j, the more of its vectors is kept
    while mean(p) < gamma: p = 1 for the last j not yet 1

Of column j of U, and independently of V, int(o p_j) (int(i p_j)) entries are dropped, chosen by the
tensor's seeded stream; the others are multiplied by size / kept, the inverse of the exact
probability to be kept, so that the restored delta is an unbiased estimate. The shapes of the matrix
set alpha; no literals of one model family.

Only the leading components that Algorithm 1 leaves below p = 1 are ever computed: mean(p) >= gamma
says that sum(1 - p_j) over them is at most (1 - gamma) k, which a prefix of s decides.

Layout, for a active components, entries column after column, positions derived from the seed:

    u     fp16/bf16      sum of kept_u    kept entries of u_1, then of u_2, ...
    v     fp16/bf16      sum of kept_v
    s     fp32           a
    kept  int32          2 x a            how many entries of u_j and v_j are kept

Lost: the components after the a-th; of the others all entries not drawn (right on average); 16-bit
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafold.codecs.base import (
    Config,
    DeltaCodec,
    Parts,
    PartSpec,
    Settings,
    Shape,
    Spectrum,
    check_parts,
)
from deltafold.coding.counter import subset
from deltafold.coding.sums import product_rows
from deltafold.lazy import torch
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import Factors, Moments, RowMatrix

_U_STREAM, _V_STREAM = 0x75, 0x76  # xor-ed into the key: U and V are drawn independently


@dataclass(frozen=True)
class ImpartConfig(Config):
    """beta: share of components dropped beforehand. c: exponent of importance (the paper's C)."""

    beta: float = 0.6
    c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", self.beta, 0.0, 0.99)
        self.check("C", self.c, 0.01, 10.0)


@dataclass(frozen=True)
class Sparsity:
    """What Algorithm 1 decides for one matrix."""

    alpha: float
    gamma: float
    components: int  # k
    p: NDArray[np.float64]  # of the active components only; all others have p = 1


def sparsity(shape: Shape, share: float, spectrum: Spectrum, beta: float, c: float) -> Sparsity:
    """Algorithm 1 on the singular values of one o x i matrix.

    `spectrum` may be a prefix of the singular values if it reaches past the active components.
    Where the share is so large that alpha < beta, nothing is drawn: plain truncation.
    """
    o, i = shape
    R = min(o, i)
    alpha = 1.0 - o * i * share / (R * (o + i))
    if alpha <= beta:
        kept = min(int(R * (1.0 - alpha)), len(spectrum))
        return Sparsity(alpha, 0.0, kept, np.zeros(kept))
    k = int(R * (1.0 - beta))
    gamma = (alpha - beta) / (1.0 - beta)
    s = np.asarray(spectrum[:k], dtype=np.float64)
    if not len(s) or s[0] <= 0:
        return Sparsity(alpha, gamma, k, np.zeros(0))
    p = (1.0 - (s / s[0]) ** c) * gamma
    # mean(p) >= gamma  <=>  the kept shares 1 - p sum to at most (1 - gamma) k; the largest prefix
    # that satisfies it is what "set the last to 1 until" arrives at.
    total = np.cumsum(1.0 - p)
    active = int(np.searchsorted(total, (1.0 - gamma) * k * (1 + 1e-12), side="right"))
    return Sparsity(alpha, gamma, k, p[:active])


def kept_counts(p: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Entries kept of each column: size - int(size p_j), as Algorithm 1 drops int(size p_j)."""
    return size - (size * p).astype(np.int64)


class Impart(DeltaCodec):
    name = "impart"
    title = "sparsified singular vectors; seeded"
    seeded = True
    paper = "arXiv 2504.13237"
    uses_factors = True
    value_parts = ("u", "v")
    Config = ImpartConfig
    config: ImpartConfig

    def components_for(self, shape: Shape, share: float) -> int:
        """A first guess: six times the columns that could be kept whole."""
        o, i = shape
        return max(
            8, min(int(min(o, i) * (1.0 - self.config.beta)), int(6 * o * i * share / (o + i)))
        )

    def components_used(self, shape: Shape, share: float, spectrum: Spectrum) -> int | None:
        """Active components; None if the prefix `spectrum` does not reach past them."""
        found = sparsity(shape, share, spectrum, self.config.beta, self.config.c)
        active = len(found.p)
        if active < len(spectrum):
            return active + 1
        limit = found.components if found.gamma else int(min(shape) * (1.0 - found.alpha))
        return None if len(spectrum) < min(limit, min(shape)) else active

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        o, i = shape
        # Without a spectrum (headers only) the counts are those of Algorithm 1's mean.
        if spectrum is None:
            full = min(int(o * i * share / (o + i)), min(shape))
            found = Sparsity(1.0 - share, 0.0, full, np.zeros(full))
        else:
            found = sparsity(shape, share, spectrum, self.config.beta, self.config.c)
        return {
            "active": len(found.p),
            "kept_u": int(kept_counts(found.p, o).sum()),
            "kept_v": int(kept_counts(found.p, i).sum()),
            "share": share,
        }

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        active = int(settings["active"])
        dtype = self.config.dtype_name
        return {
            "u": PartSpec(dtype, (int(settings["kept_u"]),)),
            "v": PartSpec(dtype, (int(settings["kept_v"]),)),
            "s": PartSpec("F32", (active,)),
            "kept": PartSpec("I32", (2, active)),
        }

    def encode(
        self,
        delta: RowMatrix,
        settings: Settings,
        key: int,
        factors: Factors | None = None,
        moments: Moments | None = None,
    ) -> tuple[Settings, Parts]:
        shape, share = delta.shape, float(settings["share"])
        if factors is None:
            factors = truncated_svd(delta, min(shape), key)
            settings = self.settings_for(shape, share, factors.s.double().numpy())
        found = sparsity(shape, share, factors.s.double().numpy(), self.config.beta, self.config.c)
        active = len(found.p)
        kept = [kept_counts(found.p, size) for size in shape]
        dtype = self.config.torch_dtype
        return settings, {
            "u": _draw(factors.u[:, :active], kept[0], key ^ _U_STREAM).to(dtype),
            "v": _draw(factors.v[:, :active], kept[1], key ^ _V_STREAM).to(dtype),
            "s": factors.s[:active].clone(),
            "kept": torch.from_numpy(np.stack(kept).astype(np.int32)),
        }

    def factors(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        kept = parts["kept"].numpy().astype(np.int64)
        u = _scatter(parts["u"].float(), kept[0], o, key ^ _U_STREAM)
        v = _scatter(parts["v"].float(), kept[1], i, key ^ _V_STREAM)
        return u * parts["s"][:, None], v

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        yield from product_rows(*self.factors(parts, settings, shape, key))


def _draw(columns: torch.Tensor, kept: NDArray[np.int64], key: int) -> torch.Tensor:
    """Kept entries of each column (size x a), column after column; not yet rescaled."""
    size = columns.shape[0]
    drawn = [torch.zeros(0, dtype=torch.float32, device="cpu")]
    for j, keep in enumerate(kept.tolist()):
        drawn.append(columns[torch.from_numpy(subset(key, j, size, keep)), j])
    return torch.cat(drawn)


def _scatter(values: torch.Tensor, kept: NDArray[np.int64], size: int, key: int) -> torch.Tensor:
    """Rows a x size: entries at their positions, times size / kept; zero elsewhere."""
    if (kept < 0).any() or (kept > size).any() or int(kept.sum()) != len(values):
        raise ValueError("the counts of kept entries do not fit the matrix")
    out = torch.zeros(len(kept), size, dtype=torch.float32, device="cpu")
    start = 0
    for j, keep in enumerate(kept.tolist()):
        at = torch.from_numpy(subset(key, j, size, keep))
        out[j, at] = values[start : start + keep] * (size / max(1, keep))
        start += keep
    return out


CODEC = Impart
