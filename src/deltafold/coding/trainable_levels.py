"""Levels times a trained unit, and a trained low-rank correction: the trainable side of `auto`."""

from __future__ import annotations

from collections.abc import Callable

from deltafold.coding import correction
from deltafold.coding.correction import Correction
from deltafold.coding.counter import gaussian
from deltafold.coding.trainable import Trainable, Values
from deltafold.lazy import torch

SPARE, POWER_STEPS = 6, 6  # of the search for a gradient's leading directions


class TrainableLevels(Trainable):
    """The unit, in units of its start; and the vectors of the correction, in units of the delta.

    `levels` (o, i) int8 and the entries' steps, `rows` (o, 1) times `columns` (i,), stay as they
    are but for the common factor. `code_with` makes the part `code` of the steps times a factor.
    """

    def __init__(
        self,
        levels: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        fix: Correction | None,
        code_with: Callable[[float], torch.Tensor],
    ):
        self.levels, self.rows, self.columns = levels, rows, columns
        self.fix, self.code_with = fix, code_with
        self.values = {"unit": torch.ones(1, dtype=torch.float32, device="cpu")}
        self.rates = {"unit": 0.003}
        if fix is not None:
            self.size = fix.left_scales
            self.values["left"] = fix.left.float()
            self.values["right"] = fix.right * fix.right_scales
            self.rates |= {"left": 0.005, "right": 0.005}

    def start(self, gradient: torch.Tensor) -> Values:
        """R (r, i) along the leading right singular vectors of the gradient (o, i).

        There L moves the loss most.
        """
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
        coded = self.levels * (self.rows * values["unit"]) * self.columns
        if self.fix is None:
            return coded
        left, right = correction.through(values["left"]), correction.through(values["right"])
        return coded.addmm((left * self.size).T, right)

    def store(self, values: Values) -> Values:
        parts = {"code": self.code_with(float(values["unit"]))}
        if self.fix is not None:
            scales, left = correction.rounded(values["left"])
            right_scales, right = correction.rounded(values["right"])
            fix = Correction(scales * self.size, right_scales, left, right)
            parts["fix"] = fix.to_part()
        return parts
