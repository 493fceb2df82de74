"""What training may change of a stored matrix, as numbers of order one.

Values are fp32 tensors in units of their own (a scale divided by its start, a vector divided by its
usual size), so that one learning rate serves matrices of all sizes. A `Trainable` turns values into
the delta they stand for, rounded as it will be stored; gradients pass through the rounding as if it
were not there (straight-through, Bengio et al. 2013, arXiv 1308.3432), so that what is trained is
what is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

from deltafold.lazy import torch

Values: TypeAlias = "dict[str, torch.Tensor]"


class Trainable(ABC):
    """The trainable side of one piece's parts. `values` are those that the parts stand for.

    `rates` gives the learning rate of each value, in its units a step.
    """

    values: Values
    rates: dict[str, float]

    @abstractmethod
    def delta(self, values: Values) -> torch.Tensor:
        """The delta (o, i), fp32, differentiable in `values`."""

    @abstractmethod
    def store(self, values: Values) -> Values:
        """All parts, in the layout that the settings promise, of values in their shapes."""

    def start(self, gradient: torch.Tensor) -> Values:
        """Values to begin with, which stand for the same delta, given the loss's gradient (o, i)."""
        return self.values


def straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `exact`, which has the same shape."""
    return exact + (rounded.float() - exact).detach()


class ScaledPattern(Trainable):
    """delta = scale * factor * pattern: one trained scale (fp32) of a fixed pattern (o, i), int8."""

    def __init__(self, pattern: torch.Tensor, scale: torch.Tensor, gain: float, parts: Values):
        self.pattern, self.scale, self.gain, self.parts = pattern, scale, gain, parts
        self.values = {"scale": torch.ones(1, dtype=torch.float32, device="cpu")}
        self.rates = {"scale": 0.01}

    def delta(self, values: Values) -> torch.Tensor:
        return self.pattern.float() * (self.scale * values["scale"] * self.gain)

    def store(self, values: Values) -> Values:
        return {**self.parts, "scale": self.scale * values["scale"]}
