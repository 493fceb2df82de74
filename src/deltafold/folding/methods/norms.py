"""A norm of a block, and how its gains are taken out of the matrices that read it, or put in.

    y = W (g n + b),  n = the normalised states         W' = W g / g',  then  y = W' (g' n)

Norms that store g - 1 (Gemma) say so by their `offset`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltafold.blocks.layout import Read

LEAST = 1e-3
"""A gain this much smaller than the root mean square of all is not divided by."""


@dataclass(frozen=True)
class Norm:
    """Local names of a norm's weight (w,) and, where it has one, its bias; the gain is weight + offset."""

    weight: str
    bias: str | None = None
    offset: float = 0.0

    def gain(self, read: Read) -> torch.Tensor:
        """What the normalised states are multiplied by (w,), fp64."""
        return read(self.weight).double() + self.offset

    def shift(self, read: Read) -> torch.Tensor:
        """What is added then (w,), fp64; zeros where there is no bias."""
        return torch.zeros_like(self.gain(read)) if self.bias is None else read(self.bias).double()

    def divisor(self, read: Read) -> torch.Tensor:
        """The gain (w,), its entries near zero raised so that other gains can be divided by it."""
        gain = self.gain(read)
        least = LEAST * gain.square().mean().sqrt().clamp_min(1e-30)
        return torch.where(gain.abs() < least, least, gain)
