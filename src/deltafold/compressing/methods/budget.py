"""Who gets how many bytes.

A budget is a file ratio, a nominal ratio or a number of bytes. All lossy matrices get the same share
of their values; what one of them cannot use (ranks are whole numbers) is passed on to the next, so
that the archive comes out as asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltafold.codecs.base import DeltaCodec, Settings, Shape, Spectrum
from deltafold.errors import BudgetError, UsageError

Kind = Literal["file_ratio", "nominal_ratio", "bytes"]


@dataclass(frozen=True)
class Budget:
    """What was asked. `file_ratio`: checkpoint bytes / archive bytes, everything counted.
    `nominal_ratio`: the papers' figure, values of linear layers only. `bytes`: of the archive."""

    kind: Kind
    asked: float

    @classmethod
    def of(
        cls,
        file_ratio: float | None = None,
        nominal_ratio: float | None = None,
        n_bytes: float | None = None,
    ) -> Budget:
        """From at most one of the three; the default is a file ratio of 32."""
        named = {"file_ratio": file_ratio, "nominal_ratio": nominal_ratio, "bytes": n_bytes}
        given = {kind: value for kind, value in named.items() if value is not None}
        if len(given) > 1:
            names = " and ".join("--" + kind.replace("_", "-") for kind in given)
            raise UsageError(f"{names} ask for different things; give one of them.")
        kind, asked = next(iter(given.items()), ("file_ratio", 32.0))
        if not 0 < asked < float("inf") or (kind != "bytes" and asked < 1):
            raise UsageError(f"--{kind.replace('_', '-')} must be at least 1, not {asked:g}.")
        return cls(kind, float(asked))  # type: ignore[arg-type]

    def target_bytes(self, checkpoint_bytes: int) -> float | None:
        """Bytes that the archive may have; None if the budget does not say."""
        if self.kind == "bytes":
            return self.asked
        return checkpoint_bytes / self.asked if self.kind == "file_ratio" else None

    def describe(self) -> str:
        if self.kind == "bytes":
            return f"{self.asked:,.0f} bytes"
        return f"{self.kind.replace('_', ' ')} {self.asked:g}"


@dataclass(frozen=True)
class Unit:
    """One matrix to be approximated. `codec` differs from the run's where the policy chose so."""

    name: str
    shape: Shape
    codec: DeltaCodec
    spectrum: Spectrum | None = None

    @property
    def raw_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.codec.config.item_bytes


def share_within(units: Sequence[Unit], available_bytes: float) -> float:
    """Share of values (kept / all) that `available_bytes` pay for."""
    total = sum(unit.raw_bytes for unit in units)
    return min(1.0, max(0.0, available_bytes / total)) if total else 0.0


def allot(units: Sequence[Unit], share: float, nominal: bool) -> tuple[list[Settings], float]:
    """Settings for each unit at one share of its values, and the bytes left over.

    In the given order. What a unit cannot use is passed on, to no unit more than a quarter of its
    own bytes and one component, so that a large matrix's rest does not swamp a small one.
    `nominal` counts values only.
    """
    carry = 0.0
    settings: list[Settings] = []
    for unit in units:
        own = share * unit.raw_bytes
        component = sum(unit.shape) * unit.codec.config.item_bytes
        target = own + min(carry, 0.25 * own + component)
        chosen, used = unit.codec.fit(unit.shape, target, unit.spectrum, nominal)
        carry += own - used
        settings.append(chosen)
    return settings, carry


def reach(shape: Shape, share: float) -> float:
    """The largest share that `allot` may try on a matrix when the common share is `share`."""
    return min(1.0, 1.7 * share + 3 * sum(shape) / (shape[0] * shape[1]))


def refuse(
    budget: Budget, checkpoint_bytes: int, smallest_bytes: int, method: str, why: str = ""
) -> BudgetError:
    """The error for a budget that cannot be met; `why`: what takes so much, if that is known."""
    return BudgetError(
        f"{budget.describe().capitalize()} cannot be met: for this pair the smallest archive of "
        f"method {method} takes about {smallest_bytes:,} bytes "
        f"(file ratio {checkpoint_bytes / smallest_bytes:.1f}); ask for at most that{why}."
    )
