"""fp32 values of weights that run in bf16 (Micikevicius et al. 2017, arXiv 1710.03740).

A step moves a weight by less than bf16 resolves. So the optimizer moves an fp32 copy, its master, and
the model runs on the master rounded; gradients are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


class Masters:
    """`parameters`: the masters of those that are not fp32, and the others themselves, by name."""

    def __init__(self, trained: Iterable[tuple[str, nn.Parameter]]):
        self.parameters: dict[str, nn.Parameter] = {}
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, run in trained:
            run.requires_grad_(True)
            if run.dtype == torch.float32:
                self.parameters[name] = run
                continue
            master = nn.Parameter(run.detach().float())
            self.parameters[name] = master
            self._pairs.append((master, run))
            run.register_post_accumulate_grad_hook(_hand_over(master))

    def round(self) -> None:
        """Let the model run on what the masters are now."""
        with torch.no_grad():
            for master, run in self._pairs:
                run.copy_(master)


def _hand_over(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def hand(run: torch.Tensor) -> None:
        assert run.grad is not None
        if master.grad is None:
            master.grad = run.grad.float()
        else:
            master.grad += run.grad
        run.grad = None

    return hand
