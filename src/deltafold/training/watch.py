"""How a training is taken up again, kept, and watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

S = TypeVar("S")


def _nobody(state: Any) -> None:
    """Who keeps nothing and says nothing."""


@dataclass(frozen=True)
class Watch(Generic[S]):
    """The state that a training goes on from, who keeps its states, and who is told of every step."""

    state: S | None = None
    save: Callable[[S], None] = _nobody
    report: Callable[[S], None] = _nobody
