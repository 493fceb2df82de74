"""What a `compress` run is asked to do, checked and in one place."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from deltafold.archive.writer import encode_side_files
from deltafold.codecs import get
from deltafold.codecs.base import Config, DeltaCodec
from deltafold.compressing.evidence import Evidence
from deltafold.compressing.methods.budget import Budget
from deltafold.compressing.pair import Pair
from deltafold.compressing.request import CompressRequest
from deltafold.errors import UsageError
from deltafold.linalg.matrices import Fisher, Moments
from deltafold.restoring.decode import piece_key
from deltafold.version import __version__


@dataclass
class CompressJob:
    """One run's inputs and settings. `budget` is None for an exact method."""

    pair: Pair
    request: CompressRequest
    config: Config
    budget: Budget | None
    evidence: Evidence = field(default_factory=Evidence)
    fisher_scale: float = 1.0
    _codecs: dict[str, DeltaCodec] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The codec that was asked for."""
        return self.request.method

    @property
    def seed(self) -> int:
        """Of random positions."""
        return self.request.seed

    @property
    def fallback(self) -> bool:
        """Whether another codec may store what the method does not suit."""
        return self.request.fallback

    @property
    def exact_method(self) -> str | None:
        """The exact codec asked for the whole model; None for a delta codec."""
        return None if get(self.method).lossy else self.method

    def codec(self, name: str) -> DeltaCodec:
        """The delta codec `name`; the run's settings apply to its own method only."""
        if name not in self._codecs:
            cls = get(name)
            assert issubclass(cls, DeltaCodec)
            own = name == self.method
            self._codecs[name] = cls(
                self.config if own else cls.Config(value_dtype=self.config.value_dtype)
            )
        return self._codecs[name]

    def key(self, tensor: str, start: int) -> int:
        """Key of the random stream of one piece: seed, tensor name and first row."""
        return piece_key(self.seed, tensor, start)

    def moments(self, tensor: str) -> Moments | None:
        """Moments of the inputs that run along a tensor's columns, where calibration saw them."""
        known = self.evidence.calibration
        if known is None:
            return None
        found = known.moments(tensor)
        return None if found is None or known.input_axis(tensor) != 1 else found

    def fisher(self, tensor: str, start: int, stop: int) -> Fisher | None:
        """What errors in rows [start, stop) of a tensor cost, where that was measured."""
        found = (self.evidence.information or {}).get(tensor)
        if found is None or len(found.rows) < stop:
            return None
        return Fisher(found.rows[start:stop] * self.fisher_scale, found.columns)

    @cached_property
    def side_files(self) -> Any:
        """Manifest entries and stored frames of config, tokenizer and the like."""
        return encode_side_files(self.pair.finetuned, self.pair.base)

    def identity(self) -> dict[str, Any]:
        """What unfinished work is bound to: inputs, settings, versions."""
        known = self.evidence
        return {
            "command": "compress",
            "base": self.pair.base.fingerprint(),
            "fine-tune": self.pair.finetuned.fingerprint(),
            **self.request.identity(),
            "method version": get(self.method).version,
            "settings": self.config.to_json(),
            "budget": [self.budget.kind, self.budget.asked] if self.budget else None,
            "text": known.calibration.folder.name if known.calibration else None,
            "information": self._information_key(),
            "training": known.distillation.identity() if known.distillation else None,
            "deltafold version": __version__,
        }

    def _information_key(self) -> str | None:
        if not self.evidence.information:
            return None
        found = hashlib.sha256()
        for name, each in sorted(self.evidence.information.items()):
            found.update(name.encode())
            found.update(each.rows.numpy().tobytes() + each.columns.numpy().tobytes())
        return found.hexdigest()[:24]

    @property
    def disk_needed_bytes(self) -> int:
        """A generous guess of what archive and unfinished work take on disk."""
        total = self.pair.finetuned.total_bytes
        target = self.budget.target_bytes(total) if self.budget else None
        if target is None:
            target = total / self.budget.asked if self.budget else 0.9 * total
        factors = self.budget and self.codec(self.method).uses_factors
        return int(2 * min(target, total)) + (total // 2 if factors else 0)


def budget_of(
    method: str,
    file_ratio: float | None = None,
    nominal_ratio: float | None = None,
    n_bytes: float | None = None,
) -> Budget | None:
    """The budget of a run with this method, None for an exact one. Raises UsageError."""
    codec = get(method)
    if not codec.method:
        raise UsageError(f"{method} is used where it fits; it cannot be asked for as a method.")
    if codec.lossy:
        return Budget.of(file_ratio, nominal_ratio, n_bytes)
    if any(value is not None for value in (file_ratio, nominal_ratio, n_bytes)):
        raise UsageError(f"{method} is exact: its size follows from the weights; drop the budget.")
    return None
