"""Text of a `share` run, in rows: what is trained on, fitted to, and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltafold.calibration import Sample, Sampling, gather_samples
from deltafold.running.record import Record
from deltafold.sharing.request import ShareRequest
from deltafold.training import Processes, Rows, pack

OWN_TEXT = "self"
OWN_SAMPLES, ALL_SAMPLES = 256, 1_000_000
CALIBRATION_SAMPLES, FIT_TOKENS = 128, 16_384


@dataclass(frozen=True)
class ShareText:
    """Reads texts with the tokenizer of `folder`: the main process does, for all."""

    folder: Path
    request: ShareRequest
    processes: Processes

    @property
    def source(self) -> str | Path:
        """What is trained on."""
        return OWN_TEXT if self.request.calibration is None else self.request.calibration

    @property
    def calibration(self) -> str | Path:
        """What the inputs of layers are measured on."""
        return "pages" if self.request.calibration is None else self.request.calibration

    @property
    def is_wanted(self) -> bool:
        """Whether anything is trained, or placed by what it costs."""
        return self.request.steps > 0 or self.request.placement == "searched"

    def training(self) -> Rows | None:
        """Rows to train on, those that will be held out among them."""
        return self._rows([self.source]) if self.is_wanted else None

    def measured(self) -> Rows | None:
        """Rows of the texts that quality is measured on; None: there are none."""
        return self._rows(self.request.measured) if self.request.measured else None

    def fitting(self, learn: Rows | None) -> Rows:
        """Rows to fit to: of those that are learned from, else of a calibration.

        Never held-out rows: those could not tell then whether training gains.
        """
        rows = self._rows([self.calibration], CALIBRATION_SAMPLES) if learn is None else learn
        return rows.chosen(range(min(len(rows), max(1, FIT_TOKENS // rows.ids.shape[1]))))

    def _rows(self, sources: Sequence[str | Path], most: int | None = None) -> Rows:
        """Rows of texts, of `most` samples of each if that is given."""
        found: list[Sample] = []
        if self.processes.is_main:
            found = [sample for source in sources for sample in self._samples(source, most)]
        return pack(self.processes.shared(found), self.request.max_tokens)

    def _samples(self, source: str | Path, most: int | None) -> list[Sample]:
        samples = most or self.request.samples
        if samples is None:
            samples = OWN_SAMPLES if str(source) == OWN_TEXT else ALL_SAMPLES
        text = Sampling(source, samples, self.request.max_tokens, self.request.seed)
        return gather_samples(self.folder, text, memory_bytes=self.request.memory_bytes)

    def to_record(self, rows: Rows, held: Rows) -> Record:
        """How much text there was."""
        each = rows.ids.shape[1]
        return {
            "source": str(self.source),
            "rows": len(rows),
            "tokens": rows.tokens,
            "held_out_rows": len(held),
            "row_tokens": each,
            "tokens_trained": self.request.steps * self.request.batch * each,
        }
