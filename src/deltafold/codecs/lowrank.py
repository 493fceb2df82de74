"""`lowrank`: the leading singular triplets of the delta.

Source: Ryu et al. 2023, "Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight
Residuals" (arXiv 2305.18425). D ~ U_r diag(s_r) V_r^T with r = floor(o i share / (o + i)).

Layout:

    u  fp16/bf16  r x o     columns of U, one after the other
    s  fp32       r
    v  fp16/bf16  r x i     columns of V

Lost: every component after the r-th, and the rounding of U and V to 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from deltafold.codecs.base import (
    DeltaCodec,
    Parts,
    PartSpec,
    Settings,
    Shape,
    Spectrum,
    check_parts,
)
from deltafold.coding.sums import product_rows
from deltafold.coding.trainable import Trainable, Values, straight_through
from deltafold.lazy import torch
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import Factors, Moments, RowMatrix


class LowRank(DeltaCodec):
    name = "lowrank"
    title = "truncated SVD"
    paper = "arXiv 2305.18425"
    uses_factors = True
    value_parts = ("u", "v")

    def components_for(self, shape: Shape, share: float) -> int:
        o, i = shape
        return min(o, i, int(o * i * share / (o + i)) + 1)

    def components_used(self, shape: Shape, share: float, spectrum: Spectrum) -> int | None:
        return min(self.components_for(shape, share), len(spectrum))

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        o, i = shape
        limit = min(shape) if spectrum is None else min(len(spectrum), *shape)
        return {"rank": min(int(o * i * share / (o + i)), limit)}

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        o, i = shape
        r = int(settings["rank"])
        dtype = self.config.dtype_name
        return {
            "u": PartSpec(dtype, (r, o)),
            "s": PartSpec("F32", (r,)),
            "v": PartSpec(dtype, (r, i)),
        }

    def encode(
        self,
        delta: RowMatrix,
        settings: Settings,
        key: int,
        factors: Factors | None = None,
        moments: Moments | None = None,
    ) -> tuple[Settings, Parts]:
        r = int(settings["rank"])
        if factors is None or factors.rank < r:
            factors = truncated_svd(delta, r, key)
            settings = settings | {"rank": (r := min(r, factors.rank))}
        dtype = self.config.torch_dtype
        return settings, {
            "u": factors.u[:, :r].T.to(dtype).contiguous(),
            "s": factors.s[:r].clone(),
            "v": factors.v[:, :r].T.to(dtype).contiguous(),
        }

    def factors(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_parts(parts, self.layout(shape, settings))
        return parts["u"].float() * parts["s"][:, None], parts["v"].float()

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        yield from product_rows(*self.factors(parts, settings, shape, key))

    def trainable(
        self, parts: Parts, settings: Settings, shape: Shape, key: int
    ) -> Trainable | None:
        return TrainableFactors(parts) if int(settings["rank"]) else None


class TrainableFactors(Trainable):
    """U, V and s: vectors in units of the usual entry of a unit vector, s in those of its start."""

    def __init__(self, parts: Parts):
        self.s, self.dtype = parts["s"], parts["u"].dtype
        self.sizes = {name: parts[name].shape[1] ** -0.5 for name in ("u", "v")}
        self.values = {name: parts[name].float() / self.sizes[name] for name in ("u", "v")}
        self.values["s"] = torch.ones_like(self.s)
        self.rates = dict.fromkeys(self.values, 0.01)

    def _vectors(self, values: Values, name: str) -> torch.Tensor:
        exact = values[name] * self.sizes[name]
        return straight_through(exact, exact.detach().to(self.dtype))

    def delta(self, values: Values) -> torch.Tensor:
        left = self._vectors(values, "u") * (self.s * values["s"])[:, None]
        return left.T @ self._vectors(values, "v")

    def store(self, values: Values) -> Parts:
        vectors = {name: (values[name] * self.sizes[name]).to(self.dtype) for name in ("u", "v")}
        return {**vectors, "s": self.s * values["s"]}


CODEC = LowRank
