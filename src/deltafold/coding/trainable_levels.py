"""Levels times trained units, and a trained low-rank correction: the trainable side of `auto`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from deltafold.coding import correction
from deltafold.coding.correction import Correction
from deltafold.coding.counter import gaussian
from deltafold.coding.trainable import Trainable, Values

SPARE, POWER_STEPS = 6, 6  # of the search for a gradient's leading directions


class TrainableLevels(Trainable):
    """Units, in units of their start; and the vectors of the correction, in units of the delta.

    `levels` (o, i) int8 stay; row k has the unit `units[group[k]]`, or 0 where `group` is as large
    as there are units; without `group` all rows have the first. `code_with` makes the part `code`
    of other units.
    """

    def __init__(
        self,
        levels: torch.Tensor,
        units: torch.Tensor,
        group: torch.Tensor | None,
        fix: Correction | None,
        code_with: Callable[[NDArray[np.float32]], torch.Tensor],
    ):
        self.levels, self.units, self.group = levels, units, group
        self.fix, self.code_with = fix, code_with
        self.values = {"units": torch.ones_like(self.units)}
        self.rates = {"units": 0.003}
        if fix is not None:
            self.size = fix.left_scales
            self.values["left"] = fix.left.float()
            self.values["right"] = fix.right * fix.right_scales
            self.rates |= {"left": 0.005, "right": 0.005}

    def start(self, gradient: torch.Tensor) -> Values:
        """R along the leading right singular vectors of the gradient: there L moves the loss most."""
        if self.fix is None:
            return self.values
        rank, i = self.values["right"].shape
        width = min(rank + SPARE, *gradient.shape)
        found = torch.from_numpy(gaussian(0, i, width)).float()
        for _ in range(POWER_STEPS):  # Halko, Martinsson and Tropp 2011
            left = torch.linalg.qr(gradient @ found).Q
            found = torch.linalg.qr(gradient.T @ left).Q
        _, turn = torch.linalg.eigh((gradient @ found).T @ (gradient @ found))
        right = (found @ turn.flip(1)[:, :rank]).T * i**0.5
        right *= right.gather(1, right.abs().argmax(dim=1, keepdim=True)).sign()
        return self.values | {"right": right.contiguous()}

    def delta(self, values: Values) -> torch.Tensor:
        units = self.units * values["units"]
        if self.group is not None:
            units = torch.cat([units, units.new_zeros(1)])[self.group][:, None]
        coded = self.levels.float() * units
        if self.fix is None:
            return coded
        left, right = correction.through(values["left"]), correction.through(values["right"])
        return coded.addmm((left * self.size).T, right)

    def store(self, values: Values) -> Values:
        parts = {"code": self.code_with((self.units * values["units"]).numpy())}
        if self.fix is not None:
            scales, left = correction.rounded(values["left"])
            right_scales, right = correction.rounded(values["right"])
            fix = Correction(scales * self.size, right_scales, left, right)
            parts["fix"] = fix.to_part()
        return parts
