"""`bitdelta`: the signs of the delta and one scale a matrix; random signs where bytes are scarce.

Source: Liu et al. 2024, "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv 2402.10193):

    D^ = a sign(D),  a = mean |D|       the a that makes ||D - a sign(D)|| smallest; sign(0) = -1

One bit a weight is a share of 1/16. More bytes change nothing. With fewer, only K signs are stored,
chosen as in `dare` by the tensor's seeded stream, and the scale is multiplied by o i / K, so that
the sum stays right on average. The paper trains the scales afterwards on the fine-tune's outputs
(Adam on the squared difference of logits): hence the scale is a part of its own. `--steps` does
so with the KL divergence, as for every method.

Layout:

    signs  uint8  ceil(K / 8)    one bit a kept entry, in row order, 1 for D > 0, first bit highest
    scale  fp32   1              a

    rows of D     + - - + | - + + -          signs  1001 0110 = 96 (hexadecimal)

Lost: all magnitudes; of the entries beyond K everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from deltafold.codecs.base import (
    DeltaCodec,
    Parts,
    PartSpec,
    Settings,
    Shape,
    Spectrum,
    check_parts,
)
from deltafold.codecs.seeded import gathered, scattered
from deltafold.coding.counter import draw
from deltafold.coding.packing import packed_bytes
from deltafold.coding.trainable import ScaledPattern, Trainable
from deltafold.lazy import torch
from deltafold.linalg.matrices import Factors, Moments, RowMatrix


class BitDelta(DeltaCodec):
    name = "bitdelta"
    title = "signs and one scale; seeded"
    seeded = True
    paper = "arXiv 2402.10193"
    value_parts = ("signs",)

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        total = shape[0] * shape[1]
        return {"kept": min(total, int(16 * share * total)), "threshold": f"{0:09x}"}

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        return {
            "signs": PartSpec("U8", (packed_bytes(int(settings["kept"]), 1),)),
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
        positive = np.zeros(kept, dtype=bool)
        magnitude = 0.0
        for rows, first, last, entries in gathered(delta, positions):
            positive[first:last] = entries > 0
            magnitude += float(rows.abs().sum(dtype=torch.float64))
        return settings | {"kept": kept, "threshold": f"{threshold:09x}"}, {
            "signs": torch.from_numpy(np.packbits(positive)),
            "scale": torch.tensor([magnitude / max(1, o * i)], dtype=torch.float32, device="cpu"),
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        kept, threshold = int(settings["kept"]), int(settings["threshold"], 16)
        bits = np.unpackbits(parts["signs"].numpy(), count=kept).astype(bool)
        level = parts["scale"] * (o * i / max(1, kept))

        def signed(first: int, last: int) -> torch.Tensor:
            return torch.where(torch.from_numpy(bits[first:last]), level, -level)

        yield from scattered(kept, signed, shape, key, threshold, "signs")

    def trainable(
        self, parts: Parts, settings: Settings, shape: Shape, key: int
    ) -> Trainable | None:
        o, i = shape
        kept = int(settings["kept"])
        if not kept or not float(parts["scale"]):
            return None
        pattern = torch.empty(o, i, dtype=torch.int8, device="cpu")
        for start, rows in self.decode(parts, settings, shape, key):
            pattern[start : start + len(rows)] = rows.sign()
        return ScaledPattern(pattern, parts["scale"], o * i / kept, dict(parts))


CODEC = BitDelta
