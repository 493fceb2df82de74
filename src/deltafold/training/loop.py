"""The loop: a student learns from text and from a teacher.

    loss  (1 - a) CE(text, q) + a t^2 KL(p_t || q_t)      mean over the counted tokens of a batch
          p, q: next-token distributions of teacher and student; p_t, q_t: at temperature t

AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with betas (.9, .95), a linear warm-up, a cosine
to zero, gradients clipped by their norm. Held-out text says which state was the best; that is kept.
The order of rows and the draws of the student follow from seed and step alone, and a state holds all
else that a step depends on: a run taken up again ends in the same bits.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deltafold.coding.counter import derive_key, shuffled
from deltafold.errors import NonFiniteError, UsageError
from deltafold.running.devices import steady_backward
from deltafold.training.distilled import distilled
from deltafold.training.processes import Processes
from deltafold.training.rows import Rows
from deltafold.training.tables import Tensors, group_of, joined
from deltafold.training.watch import Watch

BETAS, EPSILON = (0.9, 0.95), 1e-8
WARM_SHARE = 0.03
BACK_OFF = 1 / 3
"""What the rate is multiplied by where held-out text says that the student was better untrained."""
FORWARD_TOKENS = 1024
"""Tokens run at a time on a CPU, unless one row has more: gradients are accumulated over them."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids (b, t) -> logits (b, t, vocabulary)."""
GROUPS = ("values", "first", "second", "counts", "best")
"""Tables of tensors that a state holds."""


class Student(Protocol):
    """What is trained. `parameters` are those that move, by name, fp32: see `Masters` for a model in bf16."""

    parameters: dict[str, nn.Parameter]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (b, t) -> logits (b, t, vocabulary)."""

    def begin_step(self, step: int) -> None:
        """Before the first forward pass of a step, once: draws, if there are any."""

    def begin_exam(self) -> None:
        """Before held-out text is run: the student as it will be when all is done."""


@dataclass(frozen=True)
class Settings:
    """Numbers of a run. `kl_share` is a, `temperature` t; `patience` 0 never stops early.

    `forward_tokens` are run at a time. They change nothing but speed, memory and rounding.
    """

    steps: int
    rate: float = 5e-4
    batch_rows: int = 8
    kl_share: float = 0.5
    temperature: float = 2.0
    clip: float = 1.0
    decay: float = 0.0
    check_steps: int = 25
    patience: int = 0
    earliest_stop: int = 0
    seed: int = 0
    forward_tokens: int = FORWARD_TOKENS

    def check(self) -> None:
        """Raises UsageError for numbers that cannot be."""
        for name, good, words in (
            ("steps", self.steps >= 1, "at least 1"),
            ("rate", 0 < self.rate < 1, "between 0 and 1"),
            ("batch_rows", self.batch_rows >= 1, "at least 1"),
            ("kl_share", 0 <= self.kl_share <= 1, "between 0 and 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("decay", self.decay >= 0, "at least 0"),
            ("check_steps", self.check_steps >= 1, "at least 1"),
            ("patience", self.patience >= 0, "at least 0"),
        ):
            if not good:
                said = name.replace("_", "-")
                raise UsageError(f"{said} must be {words}, not {getattr(self, name)}.")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0.

        >>> [round(Settings(100, 1.0).rate_at(n), 3) for n in (0, 2, 3, 51, 99)]
        [0.333, 1.0, 1.0, 0.516, 0.0]
        """
        warm = max(1, math.ceil(WARM_SHARE * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class State:
    """Everything that the next step depends on, and the best so far. KL in nats a token.

    All but `best` are the run's own tensors, and move with its next step: save them at once.
    `curve` has (step, loss, CE, KL) a step; `exams` (step, CE, KL) of held-out text. Rates are
    multiplied by `scale`.
    """

    step: int
    values: Tensors
    first: Tensors
    second: Tensors
    counts: Tensors
    best: Tensors
    best_step: int
    curve: list[tuple[float, ...]] = field(default_factory=list)
    exams: list[tuple[float, ...]] = field(default_factory=list)
    scale: float = 1.0
    tokens_per_second: float = 0.0  # of this process's own steps; not kept

    @property
    def best_kl(self) -> float:
        return min(row[2] for row in self.exams)

    def to_tensors(self) -> Tensors:
        """One flat table, for a file: values in their shapes, curve (n, 4), exams (n, 3)."""
        groups = {name: getattr(self, name) for name in GROUPS}
        return joined(groups) | {
            "steps": torch.tensor([self.step, self.best_step]),
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "curve": torch.tensor(self.curve, dtype=torch.float64).reshape(-1, 4),
            "exams": torch.tensor(self.exams, dtype=torch.float64).reshape(-1, 3),
        }

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> State:
        """Inverse of `to_tensors`, in the same shapes."""
        step, best_step = tensors["steps"].tolist()
        curve, exams = ([tuple(row) for row in tensors[key].tolist()] for key in ("curve", "exams"))
        tables: dict[str, Any] = {name: group_of(tensors, name) for name in GROUPS}
        scale = float(tensors.get("scale", 1.0))
        return cls(step=step, best_step=best_step, curve=curve, exams=exams, scale=scale, **tables)


def train(
    student: Student,
    teacher: Logits,
    learn: Rows,
    held: Rows,
    settings: Settings,
    *,
    watch: Watch[State] | None = None,
    processes: Processes | None = None,
) -> State:
    """Train for `settings.steps`, from the state of `watch` on; the student ends with the best values.

    The watch saves every `check_steps` in the main process, and is told of each step. Raises
    UsageError, NonFiniteError.
    """
    watch = watch or Watch()
    settings.check()
    run = _Run(student, teacher, learn, held, settings, processes or Processes())
    state = run.begin(watch.state)
    started, tokens = time.perf_counter(), 0
    while state.step < settings.steps and not run.is_over(state):
        tokens += run.step(state)
        state.tokens_per_second = tokens / (time.perf_counter() - started)
        if state.step % settings.check_steps == 0 or state.step == settings.steps:
            run.check(state)
            if run.processes.is_main:
                watch.save(state)
        watch.report(state)
    _put(student.parameters, state.best)
    return state


class _Run:
    """The parts that stay the same from step to step."""

    def __init__(
        self,
        student: Student,
        teacher: Logits,
        learn: Rows,
        held: Rows,
        settings: Settings,
        processes: Processes,
    ):
        self.student, self.teacher, self.settings = student, teacher, settings
        self.learn, self.held, self.processes = learn, held, processes
        self.names = list(student.parameters)
        self.parameters = list(student.parameters.values())
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.optimizer: Any = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(
                self.parameters, settings.rate, BETAS, EPSILON, settings.decay, fused=True
            )

    def begin(self, state: State | None) -> State:
        if state is None:
            best = {name: p.detach().cpu().clone() for name, p in self.student.parameters.items()}
            state = State(0, {}, {}, {}, {}, best, 0)
            self.check(state)
            return state
        _put(self.student.parameters, state.values)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if name in state.counts:
                self.optimizer.state[parameter] = {
                    "step": state.counts[name].clone(),
                    "exp_avg": state.first[name].to(self.device).clone(),
                    "exp_avg_sq": state.second[name].to(self.device).clone(),
                }
        self._follow(state)
        return state

    def _follow(self, state: State) -> None:
        """Let the state refer to what the run has now; of a large model copies would be gigabytes."""
        state.values = {name: p.detach() for name, p in self.student.parameters.items()}
        state.first, state.second, state.counts = {}, {}, {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if held := self.optimizer.state.get(parameter):
                state.counts[name] = held["step"].detach()
                state.first[name] = held["exp_avg"].detach()
                state.second[name] = held["exp_avg_sq"].detach()

    def is_over(self, state: State) -> bool:
        """True when nothing can be trained, or held-out text has not gained for long."""
        patience = self.settings.patience
        if not self.parameters:
            return True
        if not patience or state.step < self.settings.earliest_stop:
            return False
        counts_from = max(state.best_step, self.settings.earliest_stop)
        return len([row for row in state.exams if row[0] > counts_from]) >= patience

    def step(self, state: State) -> int:
        """One step on one batch; the tokens that this process ran."""
        settings = self.settings
        batch = self.learn.chosen(batch_rows(len(self.learn), settings, state.step))
        count = int(batch.counted.sum())
        mine = batch.chosen(range(self.processes.rank, len(batch), self.processes.world))
        self.student.begin_step(state.step)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in _pieces(mine, settings.forward_tokens):
            loss, ce, kl = losses(
                self.student.logits, self.teacher, part.ids.to(self.device),
                part.counted.to(self.device), settings,
            )  # fmt: skip
            if loss.requires_grad:  # else the student is the teacher, by its draws
                with steady_backward():
                    (loss / count).backward()
            sums += torch.stack([ce, kl])
        self.processes.sum_gradients(self.parameters)
        ce_mean, kl_mean = (self.processes.total(sums) / count).tolist()
        if not math.isfinite(ce_mean + kl_mean):
            raise NonFiniteError(
                f"The loss is no longer finite at step {state.step + 1}; lower the rate "
                f"({settings.rate:g})."
            )
        nn.utils.clip_grad_norm_(self.parameters, settings.clip, foreach=self.device.type != "cpu")
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(state.step) * state.scale
        self.optimizer.step()
        a, t = settings.kl_share, settings.temperature
        state.step += 1
        state.curve.append(
            (float(state.step), (1 - a) * ce_mean + a * t * t * kl_mean, ce_mean, kl_mean)
        )
        return mine.tokens

    def check(self, state: State) -> None:
        """Look at held-out text, and bring the state up to date.

        A student that is worse than untrained begins again from there, at a lower rate: what it
        stands for is so near to the teacher that the first steps were noise. Once something is
        gained no step is taken back. While modules are replaced one by one nothing can be said yet.
        """
        self.student.begin_exam()
        ce, kl = self.processes.shared(
            exam(
                self.student.logits, self.teacher, self.held, self.device,
                self.settings.forward_tokens,
            )
        )  # fmt: skip
        state.exams.append((float(state.step), ce, kl))
        self._follow(state)
        if kl <= state.best_kl:
            _put(state.best, state.values)
            state.best_step = state.step
        elif not state.best_step and state.step >= self.settings.earliest_stop:
            self._back_off(state)

    def _back_off(self, state: State) -> None:
        """Untrained again, with a third of the rate."""
        state.scale *= BACK_OFF
        _put(self.student.parameters, state.best)
        self.optimizer.state.clear()
        self._follow(state)


def _put(into: Mapping[str, torch.Tensor], values: Tensors) -> None:
    with torch.no_grad():
        for name, held in into.items():
            held.copy_(values[name])


def batch_rows(total: int, settings: Settings, step: int) -> list[int]:
    """Numbers of the rows of a step: each row once before any comes again, shuffled every time.

    >>> [sorted(batch_rows(4, Settings(9, batch_rows=2), n)) for n in (0, 1)][1] != []
    True
    """
    places = range(step * settings.batch_rows, (step + 1) * settings.batch_rows)
    return [int(_order(settings.seed, at // total, total)[at % total]) for at in places]


@functools.lru_cache(maxsize=2)
def _order(seed: int, round_: int, total: int) -> NDArray[np.intp]:
    """In which order all rows come, one time round."""
    return shuffled(derive_key(seed, "training rows", str(round_)), total)


def _pieces(rows: Rows, tokens: int) -> Iterator[Rows]:
    each = max(1, tokens // rows.ids.shape[1])
    for start in range(0, len(rows), each):
        yield rows.chosen(range(start, min(len(rows), start + each)))


def losses(
    student: Logits,
    teacher: Logits | None,
    ids: torch.Tensor,
    counted: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, CE, KL at the temperature), each summed over the counted tokens of ids (b, t).

    Only the loss is differentiable. Without a teacher KL is 0.
    """
    # The teacher first: a student that draws may share its layers.
    with torch.no_grad():
        p = None if teacher is None else teacher(ids).flatten(0, 1)
    found = student(ids).flatten(0, 1)
    next_at = counted.flatten().nonzero()[:, 0]
    next_ids = ids.flatten()[next_at]
    return distilled(found, p, next_at - 1, next_ids, settings.kl_share, settings.temperature)


@torch.no_grad()
def exam(
    student: Logits,
    teacher: Logits | None,
    rows: Rows,
    device: torch.device,
    forward_tokens: int = FORWARD_TOKENS,
) -> tuple[float, float]:
    """(CE, KL from the teacher) of a model on rows, nats a counted token; KL 0 without a teacher."""
    sums, settings = [0.0, 0.0], Settings(1, temperature=1.0)
    for part in _pieces(rows, forward_tokens):
        ids, counted = part.ids.to(device), part.counted.to(device)
        _, ce, kl = losses(student, teacher, ids, counted, settings)
        sums = [sums[0] + float(ce), sums[1] + float(kl)]
    count = max(1, int(rows.counted.sum()))
    return sums[0] / count, sums[1] / count
