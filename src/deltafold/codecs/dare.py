"""`dare`: random entries of the delta, rescaled to stay unbiased; positions cost nothing.

Source: Yu et al. 2024, "Language Models are Super Mario" (arXiv 2311.03099): drop each entry with
probability p, multiply the others by 1 / (1 - p). Here the kept share is exact: the K entries with
the smallest keys of the tensor's seeded stream (see `coding/counter.py`), times o i / K.

Layout:

    values  fp16/bf16  K    kept entries in row order, divided by `scale`
    scale   fp32       1    largest magnitude among them

Lost: all entries but K, replaced by zero; what is kept is too large by o i / K, right on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from deltafold.codecs.base import (
    DeltaCodec,
    Parts,
    PartSpec,
    Settings,
    Shape,
    Spectrum,
    check_parts,
    unit_scale,
)
from deltafold.coding.counter import draw, kept_positions
from deltafold.linalg import Factors, Moments, RowMatrix, chunks


class Dare(DeltaCodec):
    name = "dare"
    title = "random entries, rescaled; seeded"
    seeded = True
    paper = "arXiv 2311.03099"
    value_parts = ("values",)

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        kept = int(shape[0] * shape[1] * share)
        return {"kept": kept, "threshold": f"{0:09x}"}

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        dtype = self.config.torch_dtype
        return {
            "values": PartSpec(dtype, (int(settings["kept"]),)),
            "scale": PartSpec(torch.float32, (1,)),
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
        values = torch.zeros(kept)
        for start, rows in chunks(delta):
            first, last = np.searchsorted(positions, [start * i, (start + len(rows)) * i])
            at = torch.from_numpy(positions[first:last] - start * i)
            values[first:last] = rows.reshape(-1)[at].float()
        scale = unit_scale(float(values.abs().max()) if kept else 0.0)
        return settings | {"kept": kept, "threshold": f"{threshold:09x}"}, {
            "values": (values / scale).to(self.config.torch_dtype),
            "scale": torch.tensor([scale]),
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        kept, threshold = int(settings["kept"]), int(settings["threshold"], 16)
        values = parts["values"].float() * parts["scale"] * (o * i / max(1, kept))
        used = 0
        step = max(1, (2 << 20) // i)
        for start in range(0, o, step):
            stop = min(o, start + step)
            at = torch.from_numpy(kept_positions(key, start * i, stop * i, threshold) - start * i)
            if used + len(at) > kept:
                raise ValueError("the seed gives more positions than values are stored")
            rows = torch.zeros((stop - start) * i)
            rows[at] = values[used : used + len(at)]
            used += len(at)
            yield start, rows.reshape(stop - start, i)
        if used != kept:
            raise ValueError(f"{kept} values are stored, the seed gives {used} positions")


CODEC = Dare
