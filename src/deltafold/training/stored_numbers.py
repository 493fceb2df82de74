"""Training of what an archive stores, against the fine-tune's outputs.

    loss  KL(p || q) = sum_v p(v) (log p(v) - log q(v)), mean over the tokens of a mini-batch that
          count; p the fine-tune's next-token distribution, q the candidate's

Adam (Kingma and Ba 2014, arXiv 1412.6980) with a cosine to zero, from the closed-form start. Every
eighth sample is held out: the state with the lowest KL on those is kept, the start included. The
order of samples follows from seed and step alone, so that a run can be taken up at any step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from deltafold.calibration.backward import Hook, Loss, backward
from deltafold.calibration.batches import Sample, make_batches
from deltafold.calibration.divergence import Judge
from deltafold.calibration.stream import StreamedModel
from deltafold.calibration.whole import backward_whole
from deltafold.coding.counter import derive_key, shuffled
from deltafold.coding.trainable import Values
from deltafold.training.tables import group_of, joined
from deltafold.training.watch import Watch

SAMPLES_A_STEP = 12
HELD_OUT = 8  # one sample in so many
CHECK_STEPS = 10  # between looks at the held-out samples; then the state is saved, too
WARM_STEPS = 3
START_BATCHES = 2  # whose gradient says where corrections start
BETAS, EPSILON = (0.9, 0.99), 1e-12
GROUPS = ("values", "first", "second", "best")  # tables of tensors that a state holds
WHOLE_BYTES = 16  # of a parameter in memory: weight, gradient, and what its delta is made of


class Student(Protocol):
    """A candidate under training."""

    values: Values
    rates: dict[str, float]

    def weights(self, name: str) -> torch.Tensor:
        """A checkpoint tensor as it would be restored, in its shape."""

    def wanted(self, name: str) -> bool:
        """True if values depend on the gradient of this checkpoint tensor."""

    def pull(self, name: str, gradient: torch.Tensor) -> None:
        """Add to `gradients` what the gradient of a checkpoint tensor (its shape) means for the values."""

    def begin(self, name: str, gradient: torch.Tensor) -> None:
        """Choose values to start from, given the gradient of a checkpoint tensor, of its shape."""

    gradients: Values


@dataclass
class State:
    """Everything that the next step depends on, and the best so far. KL in nats a token."""

    step: int
    values: Values
    first: Values  # Adam's mean of gradients
    second: Values  # and of their squares
    best: Values
    best_kl: float
    start_kl: float

    def to_tensors(self) -> Values:
        """One flat table, for a file: values of any shapes, and three numbers (3,)."""
        numbers = torch.tensor([self.step, self.best_kl, self.start_kl], dtype=torch.float64)
        return joined({name: getattr(self, name) for name in GROUPS}) | {"numbers": numbers}

    @classmethod
    def from_tensors(cls, tensors: Values) -> State:
        """Inverse of `to_tensors`, in the same shapes."""
        step, best_kl, start_kl = tensors["numbers"].tolist()
        tables: dict[str, Any] = {name: group_of(tensors, name) for name in GROUPS}
        return cls(step=int(step), best_kl=best_kl, start_kl=start_kl, **tables)


def split_samples(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """(samples to train on, held-out samples), both in the given order."""
    order = shuffled(derive_key(seed, "distill", "held out"), len(samples))
    held = set(order[: max(1, len(samples) // HELD_OUT)].tolist())
    return (
        [each for n, each in enumerate(samples) if n not in held],
        [each for n, each in enumerate(samples) if n in held],
    )


def train(
    student: Student,
    model: StreamedModel,
    samples: Sequence[Sample],
    steps: int,
    seed: int,
    *,
    memory_bytes: int,
    watch: Watch[State] | None = None,
) -> State:
    """Train a student for `steps` steps, from the state of `watch` on, which saves every few steps.

    `model` is the fine-tune. Raises DeltafoldError.
    """
    watch = watch or Watch()
    state = watch.state
    learn, held = split_samples(samples, seed)
    with (
        Judge(model, None, learn, memory_bytes // 2) as teacher,
        Judge(model, None, held, memory_bytes // 4) as exam,
    ):
        lessons = Lessons(teacher, learn, model, seed, memory_bytes // 2)
        if state is None:
            if student.values:
                lessons.begin(student)
            kl = exam.kl(student.weights)
            zeros = {name: torch.zeros_like(each) for name, each in student.values.items()}
            state = State(0, student.values, zeros, zeros, student.values, kl, kl)
        while state.step < steps and state.values:
            student.values = state.values
            student.gradients = {}
            lessons.teach(student, state.step)
            state = _adam(state, student, _pace(state.step, steps))
            student.values = state.values
            if state.step % CHECK_STEPS == 0 or state.step == steps:
                kl = exam.kl(student.weights)
                if kl < state.best_kl:
                    state.best, state.best_kl = state.values, kl
                watch.save(state)
            watch.report(state)
    return state


class Lessons:
    """Mini-batches, with the fine-tune's logits of their counted rows."""

    def __init__(
        self,
        teacher: Judge,
        samples: Sequence[Sample],
        model: StreamedModel,
        seed: int,
        memory_bytes: int,
    ):
        self.teacher, self.samples, self.model, self.seed = teacher, samples, model, seed
        self.first_row: dict[int, int] = {}
        row = 0
        for batch in teacher.batches:
            for number in batch.numbers:
                self.first_row[number] = row
                row += samples[number].counted
        elements = sum(info.elements for info in model.checkpoint.tensors.values())
        self.whole = WHOLE_BYTES * elements <= memory_bytes and not model.skeleton.is_whole

    def teach(self, student: Student, step: int) -> float:
        """Gradients of the mean loss of mini-batch `step` into the student; returns that loss."""
        numbers = self.numbers(step)
        total = sum(self.samples[number].counted for number in numbers)
        return self._backward(student, numbers, lambda n, g: student.pull(n, g / total)) / total

    def begin(self, student: Student) -> None:
        """Let the student choose its start, by the gradients of the first mini-batches."""
        numbers = [number for step in range(START_BATCHES) for number in self.numbers(step)]
        self._backward(student, list(dict.fromkeys(numbers)), student.begin)

    def numbers(self, step: int) -> list[int]:
        """Samples of a mini-batch: the next ones of all samples, shuffled anew in each round."""
        n = len(self.samples)
        size = min(SAMPLES_A_STEP, n)
        places = range(step * size, (step + 1) * size)
        rounds = {place // n for place in places}
        orders = {k: shuffled(derive_key(self.seed, "distill", f"round {k}"), n) for k in rounds}
        return list(dict.fromkeys(int(orders[place // n][place % n]) for place in places))

    def _backward(self, student: Student, numbers: list[int], hook: Hook) -> float:
        batches = make_batches([self.samples[number] for number in numbers])
        rows = [self._rows(numbers[place]) for batch in batches for place in batch.numbers]
        loss = _kl_loss(self.teacher, torch.cat(rows))
        run = backward_whole if self.whole else backward
        candidate = self.model.with_weights(student.weights)
        return run(candidate, batches, loss, hook, student.wanted)

    def _rows(self, number: int) -> torch.Tensor:
        first = self.first_row[number]
        return torch.arange(first, first + self.samples[number].counted)


def _kl_loss(teacher: Judge, rows: torch.Tensor) -> Loss:
    """Sums of KL, where row k of the mini-batch is row `rows[k]` of the teacher's."""

    def loss(start: int, logits: torch.Tensor) -> torch.Tensor:
        wanted = rows[start : start + len(logits)]
        # Runs of rows: those of one sample lie together.
        cuts = [0, *((wanted.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(wanted)]
        runs = [(int(wanted[a]), int(wanted[b - 1]) + 1) for a, b in pairwise(cuts)]
        target = torch.cat([teacher.teacher_logits(*run) for run in runs]).to(logits.device)
        return torch.nn.functional.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="sum"
        )

    return loss


def _pace(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a short rise, then half a cosine to zero."""
    rise = min(1.0, (step + 1) / WARM_STEPS)
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _adam(state: State, student: Student, pace: float) -> State:
    values, first, second = {}, {}, {}
    step = state.step + 1
    for name, value in state.values.items():
        gradient = student.gradients.get(name, torch.zeros_like(value))
        first[name] = state.first[name].lerp(gradient, 1 - BETAS[0])
        second[name] = state.second[name].lerp(gradient.square(), 1 - BETAS[1])
        mean = first[name] / (1 - BETAS[0] ** step)
        size = (second[name] / (1 - BETAS[1] ** step)).sqrt()
        values[name] = value - student.rates[name] * pace * mean / (size + EPSILON)
    return State(step, values, first, second, state.best, state.best_kl, state.start_kl)
