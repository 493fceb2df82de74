"""One resident model, many sets of weights: how far each is from the fine-tune on a task's answers.

One pass over prompt and right answer gives all three figures. KL and agreement compare its
predictions with the fine-tune's, which are kept. Exact match follows from the same pass for nearly
every row, because greedy decoding gives the right answer's tokens for as long as each is the
likeliest after those before it:

    answer tokens       a1     a2     a3     end
    likeliest token     a1     a2     a3     end    -> the answer: right
                        a1     b                    -> text "a1 b": can the answer still come of it?

A text that the answer does not begin with can never become the answer: wrong. Where it still can
(another split into tokens, white space after the answer) the row is generated in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.models import quiet
from deltafold.errors import MismatchError, NonFiniteError
from deltafold.evaluation.data import read_tasks
from deltafold.evaluation.estimate import Figure, proportion, ratio_of_sums
from deltafold.evaluation.exact_match import ExactMatch, first_lines
from deltafold.evaluation.loading import end_token_ids, load_tokenizer, loaded
from deltafold.evaluation.segments import Encoder, Segment, Subject, stream_logits

BATCH_ROWS = 25
Figures = dict[str, Figure]


def greedy_start(
    guesses: Sequence[int], answer: Sequence[int], end_ids: Sequence[int]
) -> tuple[list[int], bool]:
    """What greedy decoding is known to begin with, and whether it ends there.

    `guesses` (n + 1,) are the likeliest tokens after the prompt and each of the n answer tokens.
    They are what decoding would give up to the first that is not the answer's.

    >>> greedy_start([5, 7, 9], [5, 6], [0]), greedy_start([5, 6, 0], [5, 6], [0])
    (([5, 7], False), ([5, 6], True))
    """
    made: list[int] = []
    for guess, right in zip(guesses, [*answer, None], strict=True):
        if guess in end_ids:
            return made, True
        made.append(guess)
        if guess != right:
            break
    return made, False


def verdict(made: str, ended: bool, answer: str) -> bool | None:
    """Whether a text that begins with `made` is the answer, by the rule of `evaluate`.

    None where that depends on what follows. `ended`: nothing follows.

    >>> verdict(" 42", True, "42"), verdict(" 43", False, "42"), verdict(" 4", False, "42")
    (True, False, None)
    """
    wanted, text = answer.strip(), made.lstrip()
    lines = wanted.count("\n") + 1
    if ended or text.count("\n") >= lines:
        return first_lines(made, lines) == wanted
    if "\ufffd" in text:  # half a character: what it will be is not known yet
        return None
    only_space_after = text.startswith(wanted) and not text[len(wanted) :].strip()
    return None if wanted.startswith(text) or only_space_after else False


class Answers:
    """The rows of a task with the fine-tune's predictions on them, ready to score other models."""

    def __init__(self, task: ExactMatch, teacher: Subject):
        self.task = task
        # One place more than the answer: there, a model should stop.
        stop = (task.end_ids or (0,))[0]
        self.segments = [Segment((*each.ids, stop), each.start) for each in task.segments]
        # Text must only grow as tokens are added, or a wrong start could be tidied into a right one.
        self.grows = not getattr(task.encoder.tokenizer, "clean_up_tokenization_spaces", False)
        self._teacher: dict[int, torch.Tensor] = {}  # log-probabilities (n, vocabulary) by row
        self._guesses: dict[int, list[int]] = {}
        for index, log_q in self._predictions(teacher):
            self._teacher[index] = log_q[:-1]
            self._guesses[index] = log_q.argmax(-1).tolist()
        self.teacher_figures = {"exact_match": self._exact_match(teacher, self._guesses)}

    def figures(self, subject: Subject) -> Figures:
        """Exact match, KL and agreement, as `evaluate` defines them. Raises NonFiniteError."""
        n = len(self.segments)
        tokens = torch.tensor([len(s.targets) - 1.0 for s in self.segments], dtype=torch.float64)
        kl, agreed = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        guesses: dict[int, list[int]] = {}
        for index, log_q in self._predictions(subject):
            guesses[index] = log_q.argmax(-1).tolist()
            log_p, mine = self._teacher[index], self._guesses[index][:-1]
            terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q[:-1]), 0.0)
            kl[index] = terms.sum(-1).clamp(min=0).sum()
            pairs = zip(guesses[index][:-1], mine, strict=True)
            agreed[index] = sum(guess == right for guess, right in pairs)
        if not bool(kl.isfinite().all()):
            raise NonFiniteError(f"{subject.label} gives NaN or infinite predictions.")
        return {
            "exact_match": self._exact_match(subject, guesses),
            "kl": ratio_of_sums(kl, tokens),
            "agreement": ratio_of_sums(agreed, tokens),
        }

    def _predictions(self, subject: Subject) -> Iterator[tuple[int, torch.Tensor]]:
        """(row, log-probabilities (n + 1, vocabulary) in fp64), longest rows first."""
        for index, (logits,) in stream_logits([subject.model], self.segments, self.task.batch_size):
            # fp64: the KL of a good codec is below what rounding in fp32 would add.
            yield index, logits.double().log_softmax(-1)

    def verdicts(self, guesses: Mapping[int, Sequence[int]]) -> list[bool | None]:
        """Whether each row is right; None where only generating it tells."""
        found: list[bool | None] = []
        for index, (row, segment) in enumerate(
            zip(self.task.rows, self.task.segments, strict=True)
        ):
            made, ended = greedy_start(guesses[index], segment.targets, self.task.end_ids)
            text = self.task.encoder.decode(made)
            found.append(verdict(text, ended, row.answer) if self.grows else None)
        return found

    def _exact_match(self, subject: Subject, guesses: Mapping[int, Sequence[int]]) -> Figure:
        found = self.verdicts(guesses)
        hits = found.count(True)
        if None in found:
            which = [index for index, right in enumerate(found) if right is None]
            rest = replace(
                self.task,
                rows=tuple(self.task.rows[index] for index in which),
                segments=tuple(self.task.segments[index] for index in which),
            )
            share = rest.measure(subject, None)["exact_match"]["value"]
            hits += round(share * len(which))
        return proportion([number < hits for number in range(len(found))])


class Resident:
    """A fine-tune's model in memory, which takes the weights of one candidate after another."""

    def __init__(self, subject: Subject, answers: Answers):
        self.subject, self.answers = subject, answers

    def figures(self, state: Mapping[str, torch.Tensor], label: str) -> Figures:
        """Put the weights of a checkpoint in place and score them. Raises MismatchError."""
        model = self.subject.model
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        missing = sorted(set(dict(model.named_parameters())) - set(state))  # tied ones count once
        if unexpected or missing:
            raise MismatchError(
                f"{label} and the fine-tune's model differ in {[*missing, *unexpected][0]}; "
                "restore the archive and use evaluate."
            )
        return self.answers.figures(Subject(label, model))


@contextmanager
def resident(finetuned: Path, task: Path, rows: int) -> Iterator[Resident]:
    """The fine-tune in fp32 (quicker than bf16 on a CPU) with its predictions on the first `rows`."""
    with quiet():
        tokenizer = load_tokenizer(finetuned)
        (file,) = read_tasks([task], rows)
        prepared = ExactMatch.prepare(
            file, Encoder(tokenizer), end_token_ids(finetuned, tokenizer), BATCH_ROWS
        )
        with loaded("fine-tune", finetuned, None, torch.float32, "cpu") as subject:
            yield Resident(subject, Answers(prepared, subject))


def columns(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as columns of a row: `kl`, `kl_stderr`, ..."""
    values = {name: figure["value"] for name, figure in figures.items()}
    return values | {f"{name}_stderr": figure["stderr"] for name, figure in figures.items()}
