"""Least squares through a norm: a projection that a norm follows takes over what was cut.

    h' = r + g n(x W)        r: the stream; n: the normalised result; g: the norm's gains

A change of W is turned by the norm before it reaches the stream, so no closed form gives the best one
at once. Two steps are solved in turn, each in closed form, until neither helps:

    g    h' is linear in it: for each channel, what n has to be multiplied by
    W    linear as far as changes are small: n moves by dW x / s off its own direction, s = |x W| / |n|

Errors are relative to each row's length. What counts is the error on rows held out, computed through
the norm as it is; a step that does not make it smaller is halved, and in the end left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from deltafold.folding.methods.healing import Regression

WIDEST = 8192
"""A projection with more inputs is changed after itself, W S, since sums take the square of the inputs."""
ROUNDS = 3
STEPS = (1.0, 0.5, 0.25)
DAMP = 0.1
"""Of the mean square of the gains: a channel with a gain near zero asks for no boundless change."""
RIDGE = 1e-2
"""Of the mean over channels, that holds a gain where it is."""


@dataclass(frozen=True)
class Rows:
    """Rows x (n, i), the stream that they are added to and what it shall become (n, w), held (n,)."""

    x: torch.Tensor
    stream: torch.Tensor
    target: torch.Tensor
    held: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """One over the targets' lengths (n, 1)."""
        return 1 / self.target.norm(dim=1, keepdim=True).clamp_min(1e-15)


@dataclass(frozen=True)
class Ending:
    """A projection W (i, w) and the gains g (w,) of the norm after it."""

    weight: torch.Tensor
    gain: torch.Tensor
    normalise: Callable[[torch.Tensor], torch.Tensor]

    def result(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x W, n), both (n, w), of x (n, i): before the norm, and normalised without gains."""
        made = x @ self.weight
        return made, self.normalise(made)

    def error(self, rows: Iterable[Rows]) -> float:
        """Mean of |h' - target|^2 / |target|^2 over rows held out, or over all where there are none."""
        totals, counts = [0.0, 0.0], [0, 0]
        for each in rows:
            gap = each.stream + self.gain * self.result(each.x)[1] - each.target
            found = (gap * each.scale).double().square().sum(1)
            for place, chosen in enumerate((~each.held, each.held)):
                totals[place] += float(found[chosen].sum())
                counts[place] += int(chosen.sum())
        place = 1 if counts[1] else 0
        return totals[place] / max(1, counts[place])


def heal_normed(
    ending: Ending, rows: Callable[[], Iterable[Rows]]
) -> tuple[Ending, float, float, float | None]:
    """(the ending healed, its error before and after, the last ridge); the same ending if none helps."""
    before = least = ending.error(rows())
    ridge: float | None = None
    for _ in range(ROUNDS):
        start = least
        gains = replace(ending, gain=_gains(ending, rows()))
        if (found := gains.error(rows())) < least:
            ending, least = gains, found
        change, strength = _change(ending, rows())
        for step in STEPS if strength is not None else ():
            tried = replace(ending, weight=ending.weight + step * change)
            if (found := tried.error(rows())) < least:
                ending, least, ridge = tried, found, strength
                break
        if not least < (1 - 1e-3) * start:
            break
    return ending, before, least, ridge


def _gains(ending: Ending, rows: Iterable[Rows]) -> torch.Tensor:
    """argmin_g sum |stream + g n - target|^2 / |target|^2, channel by channel, of rows for fitting."""
    square = torch.zeros_like(ending.gain, dtype=torch.float64)
    cross = torch.zeros_like(square)
    for each in rows:
        chosen = ~each.held
        n = (ending.result(each.x)[1] * each.scale)[chosen].double()
        wanted = ((each.target - each.stream) * each.scale)[chosen].double()
        square += n.square().sum(0)
        cross += (n * (wanted - ending.gain * n)).sum(0)
    move = cross / (square + RIDGE * square.mean()).clamp_min(1e-300)
    return (ending.gain.double() + move).to(ending.gain.dtype)


def _change(ending: Ending, rows: Iterable[Rows]) -> tuple[torch.Tensor, float | None]:
    """(dW, its ridge): what moves n towards the target, to first order; no ridge where none helps."""
    wide = ending.weight.shape[0] > WIDEST
    regression = Regression(ending.weight.shape[1 if wide else 0], ending.weight.shape[1])
    weight = ending.gain / (ending.gain.square() + DAMP * ending.gain.square().mean())
    for each in rows:
        made, n = ending.result(each.x)
        gap = weight * (each.target - each.stream - ending.gain * n)
        length = n.norm(dim=1, keepdim=True).clamp_min(1e-15)
        gap = gap - n * ((gap * n).sum(1, keepdim=True) / length.square())
        size = (made.norm(dim=1, keepdim=True) / length).clamp_min(1e-15)
        x, y = (made if wide else each.x) * each.scale / size, gap * each.scale
        for held in (False, True):
            regression.add(x[each.held == held], y[each.held == held], held)
    fit = regression.fit()
    change = fit.solution
    if fit.ridge is not None and regression.held.rows:
        # What is judged on the rows held out must not have seen them.
        change = regression.fitted.solve(fit.ridge)
    change = change.to(ending.weight)
    return (ending.weight @ change if wide else change), fit.ridge
