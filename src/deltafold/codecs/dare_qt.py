"""`dare-qt`: random entries of the delta in few bits; positions cost nothing.

`dare` (Yu et al. 2024, arXiv 2311.03099) with the kept entries at `bits` bits instead of 16, so that
more of them are kept: K = floor(16 o i share / bits), times o i / K. The comparison of ImPart (arXiv
2504.13237) reports the best of 2, 4 and 8 bits.

Where the moments E[x x^T] of the layer's inputs are known, the kept entries are rounded by GPTQ
(arXiv 2210.17323): row by row, later kept entries make up for the error of earlier ones; the dropped
ones take no part. Else each is rounded to its nearest level.

Layout (`coding/quantizer.py`):

    codes   uint8      ceil(K bits / 8)   kept entries in row order; packed
    scales  fp16/bf16  ceil(K / 128)      one for 128 kept entries

    settings: `unit`, the exponent of the power of two that all scales are to be multiplied by

Lost: all entries but K, replaced by zero; what is kept is too large by o i / K, right on average,
and rounded to its level.
"""

from __future__ import annotations

import math
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
from deltafold.codecs.seeded import entries_at, inside, scattered
from deltafold.coding.coded_vectors import full_hessian
from deltafold.coding.counter import draw
from deltafold.coding.gptq import gptq
from deltafold.coding.packing import pack, packed_bytes, unpack_u8
from deltafold.coding.quantizer import (
    Grid,
    Groups,
    dequantise,
    entry_grid,
    fit_groups,
    quantise,
)
from deltafold.errors import UsageError
from deltafold.lazy import torch
from deltafold.linalg.matrices import Factors, Moments, RowMatrix

GROUP = 128
_GPTQ_VALUES = 16 << 20  # entries of D that GPTQ sees at once: about 13 bytes each


@dataclass(frozen=True)
class DareQtConfig(Config):
    """bits: of a kept entry."""

    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4, 8):
            raise UsageError(f"bits must be 2, 4 or 8, not {self.bits!r}.")


class DareQt(DeltaCodec):
    name = "dare-qt"
    title = "random entries in few bits; seeded"
    seeded = True
    paper = "arXiv 2311.03099"
    uses_moments = True
    value_parts = ("codes",)
    Config = DareQtConfig
    config: DareQtConfig

    @property
    def grid(self) -> Grid:
        return Grid(self.config.bits, GROUP, dtype_name=self.config.dtype_name)

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        total = shape[0] * shape[1]
        kept = min(total, int(16 * share * total / self.config.bits))
        return {"kept": kept, "threshold": f"{0:09x}", "unit": f"{0:+04d}"}

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        kept = int(settings["kept"])
        return {
            "codes": PartSpec("U8", (packed_bytes(kept, self.config.bits),)),
            "scales": PartSpec(self.config.dtype_name, (self.grid.groups(kept),)),
        }

    def encode(
        self,
        delta: RowMatrix,
        settings: Settings,
        key: int,
        factors: Factors | None = None,
        moments: Moments | None = None,
    ) -> tuple[Settings, Parts]:
        o, i = delta.shape
        threshold, positions = draw(key, o * i, int(settings["kept"]))
        kept = len(positions)
        entries = entries_at(delta, positions)
        groups = fit_groups(entries, self.grid)
        hessian = None if moments is None else full_hessian(moments.second)
        if hessian is None:
            codes = quantise(entries, self.grid, *groups)
        else:
            codes = self._gptq(entries, positions, groups, delta.shape, hessian)
        unit = math.frexp(groups.unit)[1] - 1
        return settings | {"kept": kept, "threshold": f"{threshold:09x}", "unit": f"{unit:+04d}"}, {
            "codes": torch.from_numpy(pack(codes.numpy(), self.config.bits)),
            "scales": groups.scales,
        }

    def _gptq(
        self,
        entries: torch.Tensor,
        positions: NDArray[np.int64],
        groups: Groups,
        shape: Shape,
        hessian: torch.Tensor,
    ) -> torch.Tensor:
        """Codes (K,) of the kept entries, a chunk of rows at a time: rows do not meet."""
        o, i = shape
        scale, zero = entry_grid(len(entries), self.grid, groups)
        codes = torch.zeros(len(entries), dtype=torch.uint8, device="cpu")
        step = max(1, _GPTQ_VALUES // i)
        for start in range(0, o, step):
            n_rows = min(step, o - start)
            first, last, at = inside(positions, start, n_rows, i)
            flat = torch.zeros(3, n_rows * i, dtype=torch.float32, device="cpu")
            flat[:, at] = torch.stack([x[first:last] for x in (entries, scale, zero)])
            mask = torch.zeros(n_rows * i, dtype=torch.bool, device="cpu")
            mask[at] = True
            weight, scales, zeros = flat.reshape(3, n_rows, i)
            coded = gptq(weight, hessian, scales, zeros, self.config.bits, mask.reshape(n_rows, i))
            codes[first:last] = coded.reshape(-1)[at]
        return codes

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        kept, threshold = int(settings["kept"]), int(settings["threshold"], 16)
        codes = torch.from_numpy(unpack_u8(parts["codes"].numpy(), self.config.bits, kept))
        unit = math.ldexp(1.0, int(settings["unit"]))
        values = dequantise(codes, self.grid, parts["scales"], None, unit)
        values *= o * i / max(1, kept)
        yield from scattered(kept, lambda a, b: values[a:b], shape, key, threshold)


CODEC = DareQt
