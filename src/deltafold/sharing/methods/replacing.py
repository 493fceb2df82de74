"""Progressive module replacement: at each step a shared module is used, or the original in its place.

    p_j(t) = clip(p0 + (1 - p0) (t - s_j) / (f T (1 - w)), 0, 1)   for t >= s_j, else 0
    s_j    = w f T j / max(1, n - 1)                               j = 0: the deepest of n modules

T steps in all; by step f T every module is always used. The deepest begin, and the others follow one
after the other over the share w of that time (w = 0: all at once). After BERT-of-Theseus (Xu et al.
2020, arXiv 2002.02925), as DeltaLLM does it (arXiv 2501.18596). A draw depends on seed, module and
step alone: it is the same in every process, and before and after an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltafold.coding.counter import derive_key, random_u64
from deltafold.training.masters import Masters


@dataclass(frozen=True)
class Schedule:
    """p0 `start`, f `until`, w `stagger`."""

    start: float = 0.3
    until: float = 0.5
    stagger: float = 0.5

    def probability(self, step: int, place: int, modules: int, steps: int) -> float:
        """p_j(t) of the module at `place` j of `modules`, at `step` t of `steps`.

        >>> [Schedule().probability(t, 0, 3, 100) for t in (0, 25, 50)]
        [0.3, 1.0, 1.0]
        """
        begins = self.stagger * self.until * steps * place / max(1, modules - 1)
        if step < begins:
            return 0.0
        ramp = self.until * steps * (1 - self.stagger)
        if ramp <= 0:
            return 1.0
        return min(1.0, max(0.0, self.start + (1 - self.start) * (step - begins) / ramp))

    def table(self, modules: int, steps: int, points: int = 41) -> list[dict[str, Any]]:
        """Probabilities at evenly spaced steps, for the record."""
        at = sorted({round(n * steps / max(1, points - 1)) for n in range(points)})
        return [
            {
                "step": step,
                "probabilities": [
                    round(self.probability(step, place, modules, steps), 6)
                    for place in range(modules)
                ],
            }
            for step in at
        ]


@dataclass(frozen=True)
class Swap:
    """One module of the model: its composed layers, each with the original that it stands for."""

    name: str
    layers: tuple[tuple[nn.Module, nn.Module], ...]

    def use(self, composed: bool) -> None:
        """Let the composed layers, or the originals, compute from now on."""
        for layer, original in self.layers:
            layer.__dict__.pop("forward", None)
            if not composed:
                layer.forward = original.forward


class SharedStudent:
    """A model with composed layers under training. `swaps` are its modules, the deepest first.

    The original layers are held here, not by the model: teacher and student are one model in memory,
    told apart by which layers compute.
    """

    def __init__(
        self,
        model: Any,
        swaps: Sequence[Swap],
        schedule: Schedule,
        steps: int,
        seed: int,
        masters: Masters,
    ):
        self.model, self.swaps, self.schedule = model, list(swaps), schedule
        self.steps, self.seed = steps, seed
        self._used = [True] * len(self.swaps)
        self.masters, self.parameters = masters, masters.parameters

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the student, as last drawn: (b, t) -> (b, t, vocabulary)."""
        return self.model(input_ids=ids, use_cache=False).logits

    def teacher(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (b, t, vocabulary) of the original model."""
        for swap in self.swaps:
            swap.use(False)
        try:
            return self.logits(ids)
        finally:
            self._apply()

    def use(self, composed: bool) -> None:
        """Every module, or every original in its place, until the next step or exam."""
        self._used = [composed] * len(self.swaps)
        self._apply()

    def begin_step(self, step: int) -> None:
        """Draw which modules are used in this step."""
        for place, swap in enumerate(self.swaps):
            key = derive_key(self.seed, swap.name, "replacement")
            drawn = int(random_u64(key, step, step + 1)[0]) / 2.0**64
            chance = self.schedule.probability(step, place, len(self.swaps), self.steps)
            self._used[place] = drawn < chance
        self.masters.round()
        self._apply()

    def begin_exam(self) -> None:
        """Every module is used, as in the model that is written."""
        self.masters.round()
        self.use(True)

    def _apply(self) -> None:
        for swap, used in zip(self.swaps, self._used, strict=True):
            swap.use(used)
