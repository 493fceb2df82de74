"""Multiple choice: the choice that the model finds likeliest after the prompt.

accuracy             the right choice has the highest sum of log-probabilities of its tokens
accuracy_normalised  ... the highest mean per token, which does not favour short choices
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deltafold.evaluation.data import ChoiceRow, TaskFile
from deltafold.evaluation.divergence import score
from deltafold.evaluation.estimate import proportion
from deltafold.evaluation.segments import Encoder, Segment, Subject


@dataclass(frozen=True)
class Choices:
    """The rows of a task; `segments` holds prompt + choice, row after row."""

    name: str
    rows: tuple[ChoiceRow, ...]
    segments: tuple[Segment, ...]
    batch_size: int

    @classmethod
    def prepare(cls, task: TaskFile, encoder: Encoder, batch_size: int) -> Choices:
        """Tokenise every prompt with every choice."""
        segments = tuple(
            encoder.segment(row.prompt, choice, row.where)
            for row in task.choice_rows
            for choice in row.choices
        )
        return cls(task.name, task.choice_rows, segments, batch_size)

    def longest(self) -> tuple[int, str]:
        """The most tokens that a row needs, and where that row stands."""
        places = [row.where for row in self.rows for _ in row.choices]
        lengths = [len(segment.ids) for segment in self.segments]
        return max(zip(lengths, places, strict=True))

    def measure(self, student: Subject, teacher: Subject | None) -> dict[str, Any]:
        """Accuracy by the sum and by the mean per token; the teacher is not needed."""
        scores = score(student, self.segments, self.batch_size)
        per_token = scores.loss / scores.tokens
        return {
            "accuracy": proportion(self._hits(scores.loss)),
            "accuracy_normalised": proportion(self._hits(per_token)),
        }

    def _hits(self, losses: torch.Tensor) -> list[bool]:
        """For each row, whether the right choice has the lowest loss (the first one on a tie)."""
        rows = losses.split([len(row.choices) for row in self.rows])
        return [int(part.argmin()) == row.answer for part, row in zip(rows, self.rows, strict=True)]
