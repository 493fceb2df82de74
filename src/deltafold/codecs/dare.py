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
from deltafold.codecs.seeded import entries_at, scattered
from deltafold.coding.counter import draw
from deltafold.lazy import torch
from deltafold.linalg.matrices import Factors, Moments, RowMatrix


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
        dtype = self.config.dtype_name
        return {
            "values": PartSpec(dtype, (int(settings["kept"]),)),
            "scale": PartSpec("F32", (1,)),
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
        values = entries_at(delta, positions)
        scale = unit_scale(float(values.abs().max()) if kept else 0.0)
        return settings | {"kept": kept, "threshold": f"{threshold:09x}"}, {
            "values": (values / scale).to(self.config.torch_dtype),
            "scale": torch.tensor([scale], dtype=torch.float32, device="cpu"),
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        kept, threshold = int(settings["kept"]), int(settings["threshold"], 16)
        values = parts["values"].float() * parts["scale"] * (o * i / max(1, kept))
        yield from scattered(kept, lambda a, b: values[a:b], shape, key, threshold)


CODEC = Dare
