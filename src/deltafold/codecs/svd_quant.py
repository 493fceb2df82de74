"""`svd-quant`: the leading singular triplets of the delta, their vectors in few bits.

`lowrank` (arXiv 2305.18425) with vectors at `bits` bits an entry instead of 16, so that r is larger:

    D ~ U_r diag(s_r) V_r^T,  r = floor(16 o i share / (bits (o + i)))

V is rounded first, then U, whose inputs diag(s) V^T x are taken with the V that was rounded. Where
the moments E[x x^T] of the layer's inputs are known both are rounded by GPTQ (arXiv 2210.17323),
else to nearest. What the rounding of s to 16 bits changes, U makes up for before it is rounded.

Layout (`coding/coded_vectors.py`), entries of a vector in order, vector after vector:

    codes   uint8      ceil(r i bits / 8) + ceil(r o bits / 8)    V, then U; packed
    scales  fp16/bf16  ceil(r i / 128) + ceil(r o / 128)          one for 128 entries
    s       bf16       r

Lost: every component after the r-th, and the rounding of U and V to their levels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
from deltafold.coding.coded_vectors import (
    Band,
    RunReader,
    bands,
    code_run,
    full_hessian,
    inner_hessian,
    join,
    run_size,
)
from deltafold.coding.sums import product_rows
from deltafold.coding.trainable import Trainable, Values, straight_through
from deltafold.errors import UsageError
from deltafold.lazy import torch
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import Factors, Moments, RowMatrix


@dataclass(frozen=True)
class SvdQuantConfig(Config):
    """bits: of an entry of U and V."""

    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in range(2, 9) or isinstance(self.bits, bool):
            raise UsageError(f"bits must be a whole number from 2 to 8, not {self.bits!r}.")


class CodedFactors(DeltaCodec):
    """Whole singular vectors, cut into bands of one width each."""

    uses_factors = True
    uses_moments = True
    value_parts = ("codes",)

    @abstractmethod
    def cut(self, settings: Settings) -> list[Band]:
        """The bands that these settings describe."""

    @abstractmethod
    def within(self, settings: Settings, rank: int) -> Settings:
        """The settings with no more than `rank` components."""

    def components_for(self, shape: Shape, share: float) -> int:
        return min(_rank(self.cut(self.settings_for(shape, share))) + 1, *shape)

    def components_used(self, shape: Shape, share: float, spectrum: Spectrum) -> int | None:
        return min(self.components_for(shape, share), len(spectrum))

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        cut = self.cut(settings)
        sizes = [
            run_size((band.last - band.first) * size, band.width) for band in cut for size in shape
        ]
        return {
            "codes": PartSpec("U8", (sum(n_bytes for n_bytes, _ in sizes),)),
            "scales": PartSpec(self.config.dtype_name, (sum(scales for _, scales in sizes),)),
            "s": PartSpec("BF16", (_rank(cut),)),
        }

    def encode(
        self,
        delta: RowMatrix,
        settings: Settings,
        key: int,
        factors: Factors | None = None,
        moments: Moments | None = None,
    ) -> tuple[Settings, Parts]:
        rank = _rank(self.cut(settings))
        if factors is None or factors.rank < rank:
            factors = truncated_svd(delta, rank, key)
            settings = self.within(settings, factors.rank)
            rank = _rank(self.cut(settings))
        hessian = None if moments is None else full_hessian(moments.second)
        dtype = self.config.torch_dtype
        v = factors.v[:, :rank].T
        left = factors.u[:, :rank].T * factors.s[:rank, None]  # what diag(s) U^T is to be
        s = torch.zeros(rank, dtype=torch.bfloat16, device="cpu")
        runs = []
        for band in self.cut(settings):
            here, later = slice(band.first, band.last), slice(band.last, rank)
            s[here] = left[here].norm(dim=1).bfloat16()  # of the first band: the singular values
            gains = s[here].float()[:, None]
            right = code_run(v[here], band.width, dtype, hessian)
            meets = None if hessian is None else inner_hessian(hessian, right.vectors, gains[:, 0])
            goal = left[here] / gains.clamp_min(1e-38)
            coded = code_run(goal, band.width, dtype, meets, across=True)
            left[later] -= (v[later] @ right.vectors.T) @ (coded.vectors * gains)
            runs += [right, coded]
        return settings, {**join(runs, dtype), "s": s}

    def factors(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_parts(parts, self.layout(shape, settings))
        u, v = self._vectors(parts, settings, shape)
        return u * parts["s"].float()[:, None], v

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        yield from product_rows(*self.factors(parts, settings, shape, key))

    def trainable(
        self, parts: Parts, settings: Settings, shape: Shape, key: int
    ) -> Trainable | None:
        if not _rank(self.cut(settings)):
            return None
        return TrainableGains(*self._vectors(parts, settings, shape), parts)

    def _vectors(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """U^T (r x o) and V^T (r x i) as stored."""
        o, i = shape
        cut = self.cut(settings)
        u, v = (
            torch.zeros(_rank(cut), o, dtype=torch.float32, device="cpu"),
            torch.zeros(_rank(cut), i, dtype=torch.float32, device="cpu"),
        )
        reader = RunReader(parts["codes"], parts["scales"])
        for first, last, width in cut:
            v[first:last] = reader.take((last - first) * i, width).reshape(-1, i)
            u[first:last] = reader.take((last - first) * o, width).reshape(-1, o)
        reader.finish()
        return u, v


class TrainableGains(Trainable):
    """s alone: the vectors are rounded against each other, and stay as they are."""

    def __init__(self, u: torch.Tensor, v: torch.Tensor, parts: Parts):
        self.u, self.v, self.parts = u, v, parts
        self.s = parts["s"].float()
        self.values = {"s": torch.ones_like(self.s)}
        self.rates = {"s": 0.01}

    def delta(self, values: Values) -> torch.Tensor:
        exact = self.s * values["s"]
        gains = straight_through(exact, exact.detach().bfloat16())
        return (self.u * gains[:, None]).T @ self.v

    def store(self, values: Values) -> Parts:
        return {**self.parts, "s": (self.s * values["s"]).bfloat16()}


def _rank(cut: list[Band]) -> int:
    return cut[-1].last if cut else 0


class SvdQuant(CodedFactors):
    name = "svd-quant"
    title = "truncated SVD, vectors in few bits"
    paper = "arXiv 2305.18425"
    Config = SvdQuantConfig
    config: SvdQuantConfig

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        o, i = shape
        limit = min(shape) if spectrum is None else min(len(spectrum), *shape)
        return {"rank": min(int(16 * o * i * share / (self.config.bits * (o + i))), limit)}

    def cut(self, settings: Settings) -> list[Band]:
        return bands([(int(settings["rank"]), self.config.bits)])

    def within(self, settings: Settings, rank: int) -> Settings:
        return {"rank": min(int(settings["rank"]), rank)}


CODEC = SvdQuant
