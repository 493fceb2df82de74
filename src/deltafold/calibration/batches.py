"""Samples of token ids, and batches of them for a model.

    | context: ids[:start] | counted: ids[start:], each predicted from all before it |

Batches are padded on the right. Attention looks to the left only, so padding changes nothing at the
real tokens and needs no mask; what a model gives at padding is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BATCH_TOKENS = 2048
"""Tokens of one batch, padding included, unless one sample alone has more."""


@dataclass(frozen=True)
class Sample:
    """Token ids (t,), t >= 2; predictions of `ids[start:]` count, 1 <= start < t."""

    ids: tuple[int, ...]
    start: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.ids):
            raise ValueError(
                f"a sample of {len(self.ids)} tokens cannot count from {self.start} on"
            )

    @property
    def counted(self) -> int:
        """Number of predictions that count."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Batch:
    """Samples in one tensor `ids` (b, t), with the number of each among all samples."""

    ids: torch.Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    numbers: tuple[int, ...]

    @property
    def real(self) -> torch.Tensor:
        """(b, t) bool: False at padding."""
        return torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths)[:, None]

    @property
    def counted(self) -> torch.Tensor:
        """(b, t) bool: True where the prediction of the next token counts."""
        at = torch.arange(self.ids.shape[1])
        first, last = torch.tensor(self.starts) - 1, torch.tensor(self.lengths) - 1
        return (at >= first[:, None]) & (at < last[:, None])


def sizes_of(samples: Sequence[Sample]) -> dict[str, int] | None:
    """How many samples and tokens there are, as records hold it; None where there are none."""
    if not samples:
        return None
    return {"samples": len(samples), "tokens": sum(len(sample.ids) for sample in samples)}


def make_batches(
    samples: Sequence[Sample], *, padded: bool = True, batch_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """Samples of like length together, longest first, so that memory is highest at the start.

    Without `padded` only samples of the very same length share a batch.
    """
    order = sorted(range(len(samples)), key=lambda n: (-len(samples[n].ids), n))
    groups: list[list[int]] = []
    for number in order:
        length = len(samples[number].ids)
        if groups:
            longest = len(samples[groups[-1][0]].ids)
            fits = (len(groups[-1]) + 1) * longest <= batch_tokens
            if fits and (length == longest or (padded and 4 * length >= 3 * longest)):
                groups[-1].append(number)
                continue
        groups.append([number])
    return [_batch(samples, group) for group in groups]


def _batch(samples: Sequence[Sample], numbers: list[int]) -> Batch:
    chosen = [samples[number] for number in numbers]
    ids = torch.zeros(len(chosen), len(chosen[0].ids), dtype=torch.long)
    for row, sample in enumerate(chosen):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
    return Batch(
        ids,
        tuple(len(sample.ids) for sample in chosen),
        tuple(sample.start for sample in chosen),
        tuple(numbers),
    )
