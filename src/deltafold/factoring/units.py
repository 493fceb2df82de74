"""The pass that factors: block after block, on what the factored blocks before make of the text.

    text -> embedding -> block 0 as it was     moments of its inputs -> factors
                      -> block 0, factored  -> block 1 as it was     -> ...

So later factors are fitted to the inputs that they will see. Not `sequential`, all moments are those
of the model as it was; then any blocks can be in one group. Memory holds one span of blocks' moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import nn

from deltafold.calibration import Sample, StreamedModel, make_batches
from deltafold.calibration.accumulate import Entries, Watch
from deltafold.errors import NonFiniteError
from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods.units import Ranks
from deltafold.factoring.parts import MomentsOf, make_unit
from deltafold.factoring.store import Candidate, FactorStore
from deltafold.linalg.decomposition import svd_memory_bytes
from deltafold.linalg.matrices import Moments
from deltafold.running.engine import Resources, Step, Task
from deltafold.running.workspace import Workspace


class MomentWatch:
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


class KnownMoments(Protocol):
    """Where moments come from when they do not change: a calibration on disk."""

    def moments(self, name: str) -> Moments | None: ...


class StoredMoments:
    """Moments in a workspace, for tasks that run elsewhere: each reads those that it needs."""

    def __init__(self, workspace: Workspace, folder: str, found: Mapping[str, Moments]):
        self.workspace, self.tokens = workspace, {name: each.tokens for name, each in found.items()}
        self.files: dict[str, str] = {}
        kept: dict[int, str] = {}  # several tensors may have the same inputs
        for name, each in found.items():
            if id(each) not in kept:
                kept[id(each)] = f"{folder}/{len(kept):05d}.safetensors"
                tensors = {"second": each.second, "mean": each.mean}
                workspace.save_tensors(kept[id(each)], {k: v.cpu() for k, v in tensors.items()})
            self.files[name] = kept[id(each)]

    def get(self, name: str) -> Moments | None:
        """Moments of the inputs of a checkpoint tensor; None where they are not known."""
        if name not in self.files:
            return None
        found = self.workspace.load_tensors(self.files[name])
        return Moments(found["second"], found["mean"], self.tokens[name])


def no_moments(name: str) -> None:
    """For methods that see no inputs."""


class UnitFactorer:
    """Factors every unit that has a rank into the store; finished units are kept."""

    def __init__(self, job: FactorJob, store: FactorStore, ranks: Ranks, resources: Resources):
        self.job, self.store, self.ranks, self.resources = job, store, ranks, resources
        self._done = 0

    def at_once(self, calibration: KnownMoments | None) -> None:
        """All units, by moments of the model as it was; None: without any."""
        moments: MomentsOf = no_moments if calibration is None else calibration.moments
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
                    watching = MomentWatch(model, model.memory_bytes)
                    whole.resume(entering, -1, span, watching).close()
                    self._factor(numbers, self._reachable(watching.found, span[0]))
                else:
                    self._factor(numbers, no_moments)
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

    def _reachable(self, found: Mapping[str, Moments], block: int) -> MomentsOf:
        """The moments of a span that begins with `block`, for tasks here or elsewhere."""
        if self.resources.engine is None:
            return found.get
        return StoredMoments(self.store.workspace, f"moments/{block:05d}", found).get

    def _factor(self, numbers: Sequence[int], moments_of: MomentsOf) -> None:
        tasks = []
        for number in filter(self._is_open, numbers):
            unit, rank = self.job.units[number], self.ranks[number]
            assert rank is not None
            needed = svd_memory_bytes((sum(unit.rows), unit.columns), rank) + 40 * unit.dense
            run = partial(make_and_save, self.store, number, rank, moments_of)
            tasks.append(Task(unit.name, run, needed, float(unit.dense)))
        before, total = self._done, self.job.dense
        self._done += sum(self.job.units[number].dense for number in numbers)

        def advance(step: Step) -> None:
            if self.resources.progress:
                self.resources.progress(
                    Step(step.stage, step.name, before + step.done, total, step.made_bytes)
                )

        replace(self.resources, progress=advance).run("factor", tasks)


def make_and_save(store: FactorStore, number: int, rank: int, moments_of: MomentsOf) -> int:
    """Factor a unit and keep it, with what it loses; its bytes."""
    made = make_unit(store.job, store.job.units[number], rank, moments_of)
    return store.save(number, made.tensors, {"lost": made.lost, "whole": made.whole})
