"""The record of a compression, as a report needs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from deltafold.reporting.records.evaluate import EvaluatedModel
from deltafold.reporting.records.parts import Number, Part, Run


class SpectrumPoint(Part):
    """The singular value number `index` of a delta."""

    index: int
    value: float


class TensorLine(Part):
    """One tensor of the fine-tune and how the archive holds it. `bytes` are those stored."""

    name: str
    role: str = "other"
    block: int | None = None
    dtype: str
    elements: int
    codec: str
    bytes: int
    why: str | None = None
    relative_error: Number = None
    delta_norm: Number = None
    spectrum: list[SpectrumPoint] | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes in the fine-tuned checkpoint: BF16 -> 2 an element, F8_E4M3 -> 1, BOOL -> 1."""
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (int(bits.group()) // 8 if bits else 1)


class Budget(Part):
    kind: str = "none"
    asked: Number = None
    got: Number = None


class Totals(Part):
    checkpoint_bytes: int
    archive_bytes: int
    file_ratio: float
    nominal_ratio: Number = None
    payload_bytes: int | None = None
    manifest_bytes: int | None = None
    files_bytes: int = 0


class CompressRecord(Run):
    kind: Literal["compress"]
    base: str = ""
    finetuned: str = ""
    archive: str
    method: str
    budget: Budget = Budget()
    totals: Totals
    tensors: list[TensorLine]
    scores: list[EvaluatedModel] = []

    @property
    def title(self) -> str:
        return Path(self.archive).name
