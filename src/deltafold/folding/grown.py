"""Tensors outside of the blocks that grow with their number: a part for each block, side by side.

embed_tokens_per_layer   (vocabulary, blocks x 256)   kept 0 1 4 ->   parts 0 1 4 of five
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltafold.calibration.wiring import wire
from deltafold.checkpoint import Checkpoint


@dataclass(frozen=True)
class Grown:
    """A tensor with `depth` equal parts along `axis`, of which those of the blocks `kept` are left."""

    axis: int
    depth: int
    kept: tuple[int, ...]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Shape of what is left."""
        made = list(whole)
        made[self.axis] = made[self.axis] // self.depth * len(self.kept)
        return tuple(made)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The parts of the blocks that are left: shorter along `axis`, else of the same shape."""
        parts = whole.unflatten(self.axis, (self.depth, -1))
        kept = torch.tensor(self.kept, dtype=torch.long, device="cpu")
        return parts.index_select(self.axis, kept).flatten(self.axis, self.axis + 1)


def grown_tensors(
    whole: Any, short: Any, checkpoint: Checkpoint, depth: int, kept: Sequence[int]
) -> dict[str, Grown]:
    """The checkpoint's tensors of which the shorter model has fewer parts, by name.

    `whole` and `short` are the models without weights, `kept` the numbers of the blocks left.
    """
    groups, others = wire(whole, checkpoint.tensors), dict(short.named_parameters())
    found = {}
    for name, parameter in whole.named_parameters():
        group, other = groups.get(name), others.get(name)
        if group is None or group.converter is not None or other is None:
            continue
        axes = [
            axis for axis, (old, new) in enumerate(zip(parameter.shape, other.shape, strict=False))
            if old != new
        ]  # fmt: skip
        if len(axes) == 1 and parameter.dim() == other.dim():
            old, new = parameter.shape[axes[0]], other.shape[axes[0]]
            if old % depth == 0 and new == old // depth * len(kept):
                found[group.names[0]] = Grown(axes[0], depth, tuple(kept))
    return found
