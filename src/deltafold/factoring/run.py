"""The pass that factors: block after block, on what the factored blocks before make of the text.

    text -> embedding -> block 0 as it was     moments of its inputs -> factors
                      -> block 0, factored  -> block 1 as it was     -> ...

So later factors are fitted to the inputs that they will see. Not `sequential`, all moments are those
of the model as it was; then any blocks can be in one group. Memory holds one span of blocks' moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from deltafold.calibration import Sample, StreamedModel, make_batches
from deltafold.calibration.accumulate import Entries, Watch
from deltafold.errors import NonFiniteError
from deltafold.factoring.job import Job
from deltafold.factoring.parts import MomentsOf, Settings, make_unit
from deltafold.factoring.store import Candidate, Store
from deltafold.linalg.decomposition import svd_memory_bytes
from deltafold.linalg.matrices import Moments
from deltafold.running.engine import Resources, Step, Task, run_tasks

Ranks = Sequence[int | None]


class Watching:
    """A visitor of blocks that gathers the moments of what enters their matrices."""

    def __init__(self, model: StreamedModel, allowance_bytes: int):
        self.model, self.entries = model, Entries(True, allowance_bytes)
        self.found: dict[str, Moments] = {}

    def running(
        self, number: int, parameters: dict[str, nn.Parameter]
    ) -> contextlib.AbstractContextManager[object]:
        return Watch(self.entries, parameters, self.model.skeleton.matrix_names)

    def finished(self, number: int) -> None:
        """Sums become means, and make room for the next block. Raises NonFiniteError."""
        made = [each.moments() for each in self.entries.sums]
        if not all(each.second.isfinite().all() for each in made):
            raise NonFiniteError(
                f"{self.model.label} gives NaN or infinite values in block {number}; its weights "
                "are damaged."
            )
        self.found |= {name: made[entry] for name, entry in self.entries.of_tensor.items()}
        self.entries = Entries(True, self.entries.allowance_bytes)


class Moment(Protocol):
    """Where moments come from when they do not change: a calibration on disk."""

    def moments(self, name: str) -> Moments | None: ...


class Run:
    """Factors every unit that has a rank into the store; finished units are kept."""

    def __init__(
        self, job: Job, store: Store, ranks: Ranks, settings: Settings, resources: Resources
    ):
        self.job, self.store, self.ranks = job, store, ranks
        self.settings, self.resources = settings, resources
        self._done = 0

    def at_once(self, calibration: Moment | None) -> None:
        """All units, by moments of the model as it was; None: without any."""
        moments: MomentsOf = (lambda name: None) if calibration is None else calibration.moments
        self._factor(range(len(self.job.units)), moments)

    def block_by_block(self, model: StreamedModel, samples: Sequence[Sample]) -> None:
        """Units in the order of blocks, by moments of what factored blocks lead to."""
        whole = model.with_weights(Candidate(self.job, None, self.ranks).tensor)
        made = model.with_weights(Candidate(self.job, self.store, self.ranks).tensor)
        whole.label = made.label = self.job.checkpoint.label
        entering = whole.forward(make_batches(samples, padded=False), blocks=[])
        try:
            for span in self.spans():
                numbers = [n for n, u in enumerate(self.job.units) if u.blocks[0] in span]
                if any(self._is_open(number) for number in numbers):
                    watching = Watching(model, model.memory_bytes)
                    whole.resume(entering, -1, span, watching).close()
                    self._factor(numbers, watching.found.get)
                else:
                    self._factor(numbers, lambda name: None)
                if span[-1] + 1 < self.job.blocks:
                    leaving = made.resume(entering, -1, span)
                    entering.close()
                    entering = leaving
        finally:
            entering.close()

    def spans(self) -> list[list[int]]:
        """Stretches of blocks such that each unit lies within one."""
        found: list[list[int]] = []
        last = -1
        for block in range(self.job.blocks):
            reach = max((u.blocks[-1] for u in self.job.units if u.blocks[0] == block), default=0)
            if block > last:
                found.append([])
            found[-1].append(block)
            last = max(last, reach)
        return found

    def _is_open(self, number: int) -> bool:
        return self.ranks[number] is not None and not self.store.has(number)

    def _factor(self, numbers: Sequence[int], moments_of: MomentsOf) -> None:
        def work(number: int) -> int:
            rank = self.ranks[number]
            assert rank is not None
            made = make_unit(self.job, self.job.units[number], rank, moments_of, self.settings)
            return self.store.save(number, made.tensors, {"lost": made.lost, "whole": made.whole})

        tasks = []
        for number in filter(self._is_open, numbers):
            unit = self.job.units[number]
            shape = (sum(unit.rows), unit.columns)
            needed = svd_memory_bytes(shape, self.ranks[number] or 1) + 40 * unit.dense
            tasks.append(
                Task(unit.name, lambda n=number: work(n), needed, float(unit.dense))  # type: ignore[misc]
            )
        before, total = self._done, self.job.dense
        self._done += sum(self.job.units[number].dense for number in numbers)

        def advance(step: Step) -> None:
            if self.resources.progress:
                self.resources.progress(
                    Step(step.stage, step.name, before + step.done, total, step.made_bytes)
                )

        run_tasks("factor", tasks, self.resources.workers, self.resources.memory_bytes, advance)
