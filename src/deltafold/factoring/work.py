"""The steps of one `factor` run, and the text and model that they share."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

from deltafold.calibration import Calibration, StreamedModel, calibrate, gather_samples
from deltafold.calibration.batches import Sample
from deltafold.calibration.probe import Probe, few, parted
from deltafold.factoring.groups import alike_groups
from deltafold.factoring.job import Job
from deltafold.factoring.methods.units import Ranks
from deltafold.factoring.parts import Settings
from deltafold.factoring.ranks import Search, depth_ranks, shared_ranks, threshold_ranks
from deltafold.factoring.run import Run
from deltafold.factoring.store import Candidate, Store
from deltafold.running.engine import Resources
from deltafold.running.record import Record
from deltafold.running.workspace import Workspace


@dataclass(frozen=True)
class Asked:
    """What a run is asked to do beside its method, as the record and the journal hold it."""

    parameters: float
    group: int
    grouping: str
    sequential: bool
    refit: bool
    centre: bool
    damping: float
    trials: int
    calibration: str
    samples: int
    max_tokens: int
    seed: int
    dense: bool


class Work:
    """One run's text, model and steps."""

    def __init__(self, job: Job, asked: Asked, workspace: Workspace, resources: Resources):
        self.job, self.asked, self.workspace, self.resources = job, asked, workspace, resources
        self.settings = Settings(asked.damping, job.centred, asked.refit, asked.seed)
        self.samples: list[Sample] = []
        self.measured: list[Sample] = []
        self._model: StreamedModel | None = None

    @property
    def sizes(self) -> dict[str, int] | None:
        """Samples and tokens that were run through the model."""
        if not self.samples:
            return None
        tokens = sum(len(sample.ids) for sample in self.samples)
        return {"samples": len(self.samples), "tokens": tokens}

    @property
    def model(self) -> StreamedModel:
        """The model, to be run block by block; layers that gain a bias have it."""
        if self._model is None:
            self._model = StreamedModel(
                self.job.checkpoint,
                memory_bytes=self.resources.memory_bytes,
                scratch=self.workspace.folder,
            )
            for matrix in self.job.matrices.values():
                if self.job.centred and matrix.bias is None and not matrix.stacked:
                    self._model.skeleton.add_bias(matrix.module)
        return self._model

    def read(self, measure: str | Path | None) -> None:
        """Samples, before any work: a bad text is told of first."""
        if measure is not None:
            self.measured = self._gather(measure)
        if self.job.method.whitened or self.job.method.ranking == "search":
            self.samples = self._gather(self.asked.calibration)

    def _gather(self, source: str | Path) -> list[Sample]:
        return gather_samples(
            self.model,
            source,
            samples=self.asked.samples,
            max_tokens=self.asked.max_tokens,
            seed=self.asked.seed,
            memory_bytes=self.resources.memory_bytes,
        )

    @property
    def is_sequential(self) -> bool:
        grouped_alike = self.job.method.grouped and self.asked.grouping == "alike"
        return self.asked.sequential and not grouped_alike

    @functools.cached_property
    def calibration(self) -> Calibration:
        """Moments of the model as it was, on disk."""
        return self._calibrated(self.samples)

    def _calibrated(self, samples: list[Sample]) -> Calibration:
        return calibrate(
            self.job.checkpoint.path,
            samples,
            memory_bytes=self.resources.memory_bytes,
            progress=self.resources.progress,
        )

    def ranks(self) -> tuple[Job, Ranks, Record]:
        """The job with its groups, a rank for each unit, and how they were found."""
        method, progress = self.job.method, self.resources.progress
        notes: Record = {}
        if method.grouped and self.asked.grouping == "alike":
            self.job = alike_groups(self.job, self.calibration, self.asked.group)
        if method.ranking == "search":
            ranks, notes = self._searched()
        elif method.ranking == "threshold":
            ranks, notes = threshold_ranks(self.job, progress)
        elif method.ranking == "depth":
            ranks, notes = depth_ranks(self.job, progress)
        else:
            ranks = shared_ranks(self.job)
        return self.job, ranks, notes

    def _searched(self) -> tuple[Ranks, Record]:
        """Trials are judged on samples that their factors have not seen."""
        if self.workspace.has("search.json"):
            found = self.workspace.load_json("search.json")
            return found["ranks"], found["notes"]
        whole = Candidate(self.job, None, [])
        seen, held = parted(self.samples)
        with contextlib.closing(Probe(self.model, whole, few(held))) as probe:
            reach = Store(self.job, self.workspace, "reach")
            search = Search(self.job, self.model, probe, reach)
            moments = self._calibrated(seen).moments
            search.prepare(moments, self.settings, self.resources.progress)
            ranks, notes = search.run(self.asked.trials, self.asked.seed, self.resources.progress)
        self.workspace.save_json("search.json", {"ranks": ranks, "notes": notes})
        return ranks, notes

    def factored(self, ranks: Ranks) -> Store:
        """Factors of every unit."""
        store = Store(self.job, self.workspace)
        run = Run(self.job, store, ranks, self.settings, self.resources)
        if not self.job.method.whitened:
            run.at_once(None)
        elif self.is_sequential:
            run.block_by_block(self.model, self.samples)
        else:
            run.at_once(self.calibration)
        return store

    def quality(self, ranks: Ranks, store: Store) -> Record:
        """Perplexity, KL to the model, and agreement with it, on the text to measure on."""
        whole, made = Candidate(self.job, None, ranks), Candidate(self.job, store, ranks)
        with contextlib.closing(Probe(self.model, whole, self.measured)) as probe:
            return {
                "model": probe.measure(whole) | {"tokens": probe.tokens},
                "factored": probe.measure(made) | {"tokens": probe.tokens},
            }
