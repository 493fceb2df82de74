"""Exact match: greedy generation, and the answer must be right to the letter.

Generation stops at an end token, or at a line break once there is as much text as the answer has
lines. What was generated and the answer are compared with white space around them removed.

The same rows also give the divergence from the fine-tune on the tokens of the right answers, each
predicted after the prompt and the right tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltafold.evaluation.data import AnswerRow, TaskFile
from deltafold.evaluation.divergence import score
from deltafold.evaluation.estimate import proportion
from deltafold.evaluation.segments import Encoder, Segment, Subject

SPARE_TOKENS = 8
"""Tokens allowed beyond the longest answer: another tokenisation of it may be longer."""


def first_lines(text: str, count: int) -> str:
    """The first `count` lines after leading white space, stripped.

    >>> first_lines(" 42\\nQuestion: next", 1)
    '42'
    """
    return "\n".join(text.lstrip().split("\n")[:count]).strip()


class _EnoughLines:
    """A row is done when a line break follows its wanted number of lines.

    A criterion as `generate` calls it, without the base class, which would import transformers.
    """

    def __init__(self, encoder: Encoder, prompt_tokens: int, wanted: Sequence[int]):
        self.encoder, self.prompt_tokens, self.wanted = encoder, prompt_tokens, wanted

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = [self.encoder.decode(row) for row in input_ids[:, self.prompt_tokens :].tolist()]
        done = [
            text.lstrip().count("\n") >= count
            for text, count in zip(texts, self.wanted, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


@dataclass(frozen=True)
class ExactMatch:
    """The rows of a task, tokenised once for all models; `segments` holds prompt + answer."""

    name: str
    rows: tuple[AnswerRow, ...]
    segments: tuple[Segment, ...]
    encoder: Encoder
    end_ids: tuple[int, ...]
    max_new_tokens: int
    batch_size: int
    answers: int = 0  # of the first rows, what was written is kept

    @classmethod
    def prepare(
        cls,
        task: TaskFile,
        encoder: Encoder,
        end_ids: Sequence[int],
        batch_size: int,
        max_new_tokens: int | None = None,
        answers: int = 0,
    ) -> ExactMatch:
        """Tokenise; without `max_new_tokens` it is the longest answer and `SPARE_TOKENS`."""
        rows = task.answer_rows
        segments = tuple(encoder.segment(row.prompt, row.answer, row.where) for row in rows)
        cap = max_new_tokens or max(len(each.targets) for each in segments) + SPARE_TOKENS
        return cls(task.name, rows, segments, encoder, tuple(end_ids), cap, batch_size, answers)

    def longest(self) -> tuple[int, str]:
        """The most tokens that a row needs, and where that row stands."""
        needs = [
            (max(len(each.ids), each.start + self.max_new_tokens), row.where)
            for each, row in zip(self.segments, self.rows, strict=True)
        ]
        return max(needs)

    def measure(self, student: Subject, teacher: Subject | None) -> dict[str, Any]:
        """Exact match; with a teacher also `kl` and `agreement` on the answers' tokens.

        `answers`, where any are to be kept: what the model wrote to the first rows.
        """
        texts = self.generate(student)
        hits = [
            first_lines(text, _line_count(row)) == row.answer.strip()
            for text, row in zip(texts, self.rows, strict=True)
        ]
        figures: dict[str, Any] = {"exact_match": proportion(hits)}
        if teacher is not None:
            scores = score(student, self.segments, self.batch_size, teacher)
            figures["kl"], figures["agreement"] = scores.divergence()
        if self.answers:
            kept = list(zip(self.rows, texts, hits, strict=True))[: self.answers]
            figures["answers"] = [self._answer(*each) for each in kept]
        return figures

    def _answer(self, row: AnswerRow, text: str, right: bool) -> dict[str, Any]:
        return {
            "task": self.name,
            "prompt": row.prompt,
            "wanted": row.answer.strip(),
            "text": first_lines(text, _line_count(row)),
            "right": right,
        }

    def generate(self, student: Subject) -> list[str]:
        """The greedy continuation of every prompt, in the order of the rows."""
        prompts = [segment.ids[: segment.start] for segment in self.segments]
        # Prompts of like length share a batch, which keeps padding small.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        texts = [""] * len(prompts)
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            wanted = [_line_count(self.rows[index]) for index in batch]
            made = self._generate_batch(student, [prompts[index] for index in batch], wanted)
            for index, text in zip(batch, made, strict=True):
                texts[index] = text
        return texts

    @torch.inference_mode()
    def _generate_batch(
        self, student: Subject, prompts: Sequence[tuple[int, ...]], wanted: Sequence[int]
    ) -> list[str]:
        from transformers import GenerationConfig, StoppingCriteriaList

        longest = max(map(len, prompts))
        pad = self.end_ids[0] if self.end_ids else 0
        ids = torch.full((len(prompts), longest), pad, device=student.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left padding: generation goes on at the right
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=student.device)
            mask[row, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.end_ids) or None,
            pad_token_id=pad,
        )
        stop = StoppingCriteriaList([_EnoughLines(self.encoder, longest, wanted)])
        made = student.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=stop
        )
        return [self._text(row) for row in made[:, longest:].tolist()]

    def _text(self, ids: list[int]) -> str:
        """Text up to the first end token."""
        ends = [position for position, token in enumerate(ids) if token in self.end_ids]
        return self.encoder.decode(ids[: ends[0]] if ends else ids)


def _line_count(row: AnswerRow) -> int:
    return row.answer.strip().count("\n") + 1
