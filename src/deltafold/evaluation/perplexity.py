"""Perplexity of a text, and divergence from the fine-tune on the same tokens.

A text of tokens x0 x1 x2 ... is cut into windows of at most T tokens. The first token of a window
is context, the others are scored, so every token is scored once:

    tokenizer with a beginning-of-text token B     | B x0 x1 x2 | B x3 x4 x5 | ...
    tokenizer without one (x0 is never scored)     | x0 x1 x2 x3 | x3 x4 x5 x6 | ...

    perplexity = exp(-1/n sum log q(x_i | the window before x_i))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltafold.errors import NonFiniteError
from deltafold.evaluation.data import TaskError, TextFile
from deltafold.evaluation.divergence import score
from deltafold.evaluation.estimate import exponential, ratio_of_sums
from deltafold.evaluation.segments import Encoder, Segment, Subject


def windows(ids: Sequence[int], prefix: Sequence[int], max_length: int) -> list[Segment]:
    """Windows of at most `max_length` tokens (>= 2) in which every scorable token is scored once.

    >>> [w.ids for w in windows([5, 6, 7, 8], [], 3)]
    [(5, 6, 7), (7, 8)]
    >>> [w.ids for w in windows([5, 6, 7, 8], [1], 3)]
    [(1, 5, 6), (1, 7, 8)]
    """
    if prefix:
        if list(ids[:1]) == list(prefix):  # the text spells the token out itself
            ids = ids[1:]
        step = max_length - 1
        return [
            Segment((*prefix, *ids[at : at + step]), start=1) for at in range(0, len(ids), step)
        ]
    return [
        Segment(tuple(ids[at : at + max_length]), start=1)
        for at in range(0, len(ids) - 1, max_length - 1)
    ]


@dataclass(frozen=True)
class Texts:
    """The windows of all texts; windows never run from one text into the next."""

    segments: tuple[Segment, ...]
    batch_size: int

    @classmethod
    def prepare(
        cls,
        files: Sequence[TextFile],
        encoder: Encoder,
        max_length: int,
        batch_size: int,
        limit: int | None = None,
    ) -> Texts:
        """Tokenise and cut; `limit` keeps the first windows of each text. Raises TaskError."""
        segments: list[Segment] = []
        for file in files:
            cut = windows(encoder.ids(file.text), encoder.prefix, max_length)
            if not cut:
                raise TaskError(f"{file.path} has fewer than two tokens; give a longer text.")
            segments += cut[:limit]
        return cls(tuple(segments), batch_size)

    def measure(self, student: Subject, teacher: Subject | None) -> dict[str, Any]:
        """Perplexity; with a teacher (the fine-tune) also `kl_text` and `agreement_text`."""
        scores = score(student, self.segments, self.batch_size, teacher)
        loss = ratio_of_sums(scores.loss, scores.tokens)
        try:
            figures = {"perplexity": exponential(loss)}
        except OverflowError:
            raise NonFiniteError(
                f"The perplexity of {student.label} is too large for any number ({loss['value']:.0f} "
                "nats a token); its weights are useless: leave it out."
            ) from None
        if teacher is not None:
            figures["kl_text"], figures["agreement_text"] = scores.divergence()
        return figures
