"""`magnitude`: the largest entries of the delta; their positions are stored, and counted.

Source: magnitude pruning of deltas as in Yadav et al. 2023 (ComPEFT, arXiv 2311.13171) and as the
baseline of the sparsification papers, which leave the positions out of their ratio.

Layout, for K kept of N = o i:

    low, high  uint8      positions, Elias-Fano: about 2 + log2(N / K) bits each
    values     fp16/bf16  K entries in row order, divided by `scale`
    scale      fp32       1

Lost: all entries but the K largest, replaced by zero. Not unbiased: the delta shrinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

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
from deltafold.codecs.seeded import entries_at, inside
from deltafold.coding.counter import select_threshold
from deltafold.coding.packing import EliasFano
from deltafold.lazy import torch
from deltafold.linalg.matrices import Factors, Moments, RowMatrix, chunks


def _smallness(rows: torch.Tensor) -> NDArray[np.uint32]:
    """Keys that fall as |value| grows: the bit pattern of |x| is monotone in |x|."""
    bits = rows.reshape(-1).abs().contiguous().view(torch.int32).numpy().astype(np.uint32)
    return np.uint32(0x7FFFFFFF) - bits


class Magnitude(DeltaCodec):
    name = "magnitude"
    title = "largest entries, coded positions"
    paper = "arXiv 2311.13171"
    value_parts = ("values",)

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        return {"kept": int(shape[0] * shape[1] * share)}

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        kept = int(settings["kept"])
        coder = EliasFano(kept, shape[0] * shape[1])
        dtype = self.config.dtype_name
        return {
            "low": PartSpec("U8", (coder.low_bytes,)),
            "high": PartSpec("U8", (coder.high_bytes,)),
            "values": PartSpec(dtype, (kept,)),
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
        positions, values = _largest(delta, int(settings["kept"]))
        low, high = EliasFano(len(values), delta.shape[0] * delta.shape[1]).encode(positions)
        scale = unit_scale(float(values.abs().max()) if len(values) else 0.0)
        return settings, {
            "low": torch.from_numpy(low),
            "high": torch.from_numpy(high),
            "values": (values / scale).to(self.config.torch_dtype),
            "scale": torch.tensor([scale], dtype=torch.float32, device="cpu"),
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        coder = EliasFano(int(settings["kept"]), o * i)
        positions = coder.decode(parts["low"].numpy(), parts["high"].numpy())
        values = parts["values"].float() * parts["scale"]
        step = max(1, (2 << 20) // i)
        for start in range(0, o, step):
            stop = min(o, start + step)
            first, last, at = inside(positions, start, stop - start, i)
            rows = torch.zeros((stop - start) * i, dtype=torch.float32, device="cpu")
            rows[at] = values[first:last]
            yield start, rows.reshape(stop - start, i)


def _largest(delta: RowMatrix, keep: int) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Positions (ascending) and values of exactly `keep` largest entries; ties go to the first."""
    threshold, below = select_threshold(lambda: (_smallness(r) for _, r in chunks(delta)), keep)
    if below > keep:  # a tie at the threshold: take those strictly above, then fill up in order
        threshold -= 1
    found: list[NDArray[np.int64]] = []
    tied: list[NDArray[np.int64]] = []
    columns = delta.shape[1]
    for start, rows in chunks(delta):
        keys = _smallness(rows).astype(np.int64)
        found.append(np.flatnonzero(keys < threshold) + start * columns)
        tied.append(np.flatnonzero(keys == threshold) + start * columns)
    positions = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    fill = np.concatenate(tied)[: max(0, keep - len(positions))] if tied else positions
    positions = np.sort(np.concatenate([positions, fill]))
    return positions, entries_at(delta, positions)


CODEC = Magnitude
