"""Several tables of tensors as one, for a file: what a training run is taken up again from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = dict[str, torch.Tensor]


def joined(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> Tensors:
    """Tensors of any shape as {"group/name": tensor}, on the CPU."""
    return {f"{group}/{k}": v.cpu() for group, held in groups.items() for k, v in held.items()}


def group_of(tensors: Mapping[str, torch.Tensor], group: str) -> Tensors:
    """One group of a joined table, tensors of any shape by their names in it."""
    start = f"{group}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
