"""Text packed into rows of equal length.

    | sample 0 .......... | sample 1 ... | sam|    row 0
    |ple 2 ..... | sample 3 ................. |    row 1

Samples follow each other without padding; what a row has before a sample is context of it, for the
teacher and for the student alike. Tokens that samples do not count (prompts) are not counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltafold.calibration.batches import Sample
from deltafold.coding.counter import derive_key, subset
from deltafold.errors import UsageError

HELD_OUT, HELD_OUT_MOST = 10, 24
"""One row in so many is held out, at most so many in all."""


@dataclass(frozen=True)
class Rows:
    """Token ids (n, t), and which of them are to be predicted (n, t): never the first of a row."""

    ids: torch.Tensor
    counted: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def chosen(self, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers, in this order."""
        at = torch.tensor(list(numbers), dtype=torch.long)
        return Rows(self.ids[at], self.counted[at])

    def split(self, seed: int) -> tuple[Rows, Rows]:
        """(rows to train on, held-out rows). Raises UsageError for less than two rows."""
        if len(self) < 2:
            raise UsageError(
                "The text makes only one row of tokens, and two are needed: one to learn from, one to "
                "check on; give more text, or shorter rows."
            )
        wanted = max(1, min(HELD_OUT_MOST, len(self) // HELD_OUT))
        held = subset(derive_key(seed, "training", "held out"), 0, len(self), wanted).tolist()
        left = sorted(set(range(len(self))) - set(held))
        return self.chosen(left), self.chosen(held)


def pack(samples: Sequence[Sample], row_tokens: int) -> Rows:
    """Samples one after the other in rows of `row_tokens`; what fills no row is left out.

    A text shorter than two rows makes two shorter ones.
    """
    ids = [token for sample in samples for token in sample.ids]
    counted = [at >= sample.start for sample in samples for at in range(len(sample.ids))]
    row_tokens = max(2, min(row_tokens, len(ids) // 2))
    rows = len(ids) // row_tokens
    held = torch.tensor(ids[: rows * row_tokens]).view(rows, row_tokens)
    counts = torch.tensor(counted[: rows * row_tokens]).view(rows, row_tokens)
    counts[:, 0] = False
    kept = counts.any(dim=1)
    return Rows(held[kept], counts[kept])
