"""The steps of one `factor` run, and the text and model that they share."""

from __future__ import annotations

import contextlib
import functools

import torch

from deltafold.calibration import Calibration, StreamedModel, calibrate
from deltafold.calibration.batches import Sample, sizes_of
from deltafold.calibration.gather import asked_samples
from deltafold.calibration.probe import Probe, few, parted
from deltafold.factoring.groups import alike_groups
from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods.units import Ranks
from deltafold.factoring.ranks import (
    SplitSearch,
    depth_ranks,
    shared_ranks,
    threshold_ranks,
    unit_spectra,
)
from deltafold.factoring.request import FactorRequest
from deltafold.factoring.store import Candidate, FactorStore
from deltafold.factoring.units import UnitFactorer
from deltafold.running.engine import Resources
from deltafold.running.record import Record
from deltafold.running.workspace import Workspace


class FactorRun:
    """One run's text, model and steps."""

    def __init__(
        self, job: FactorJob, request: FactorRequest, workspace: Workspace, resources: Resources
    ):
        self.job, self.request, self.workspace, self.resources = job, request, workspace, resources
        self.samples: list[Sample] = []
        self.measured: list[Sample] = []

    @property
    def sizes(self) -> dict[str, int] | None:
        """Samples and tokens that were run through the model."""
        return sizes_of(self.samples)

    @functools.cached_property
    def model(self) -> StreamedModel:
        """The model, to be run block by block; layers that gain a bias have it."""
        model = StreamedModel(
            self.job.checkpoint,
            memory_bytes=self.resources.memory_bytes,
            scratch=self.workspace.folder,
        )
        for matrix in self.job.matrices.values():
            if self.job.centred and matrix.bias is None and not matrix.stacked:
                model.skeleton.add_bias(matrix.module)
        return model

    def read(self) -> None:
        """Samples, before any work: a bad text is reported first."""
        if self.request.text is not None:
            self.measured = asked_samples(self.request, self.model, self.request.text)
        if self.job.method.looks:
            self.samples = asked_samples(self.request, self.model, self.request.calibration)

    @property
    def is_sequential(self) -> bool:
        grouped_alike = self.job.method.grouped and self.request.grouping == "alike"
        return self.request.sequential and not grouped_alike

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

    def ranks(self) -> tuple[FactorJob, Ranks, Record]:
        """The job with its groups, a rank for each unit, and how they were found."""
        method, notes = self.job.method, Record()
        if method.grouped and self.request.grouping == "alike":
            self.job = alike_groups(self.job, self.calibration, self.request.group)
        if method.ranking == "search":
            ranks, notes = self._searched()
        elif method.ranking == "threshold":
            ranks, notes = threshold_ranks(self.job, self._spectra())
        elif method.ranking == "depth":
            ranks, notes = depth_ranks(self.job, self._spectra())
        else:
            ranks = shared_ranks(self.job)
        return self.job, ranks, notes

    def _spectra(self) -> list[torch.Tensor]:
        return unit_spectra(self.job, self.workspace, self.resources)

    def _searched(self) -> tuple[Ranks, Record]:
        """Trials are judged on samples that their factors have not seen."""
        if self.workspace.has("search.json"):
            found = self.workspace.load_json("search.json")
            return found["ranks"], found["notes"]
        whole = Candidate(self.job, None, [])
        seen, held = parted(self.samples)
        with contextlib.closing(Probe(self.model, whole, few(held))) as probe:
            reach = FactorStore(self.job, self.workspace, "reach")
            search = SplitSearch(self.job, probe, reach)
            search.prepare(self._calibrated(seen).moments, self.resources)
            ranks, notes = search.run(self.resources.progress)
        self.workspace.save_json("search.json", {"ranks": ranks, "notes": notes})
        return ranks, notes

    def factored(self, ranks: Ranks) -> FactorStore:
        """Factors of every unit."""
        store = FactorStore(self.job, self.workspace)
        factorer = UnitFactorer(self.job, store, ranks, self.resources)
        if not self.job.method.whitened:
            factorer.at_once(None)
        elif self.is_sequential:
            factorer.block_by_block(self.model, self.samples)
        else:
            factorer.at_once(self.calibration)
        return store

    def quality(self, ranks: Ranks, store: FactorStore) -> Record:
        """Perplexity, KL to the model, and agreement with it; nothing without a text."""
        if not self.measured:
            return {}
        whole, made = Candidate(self.job, None, ranks), Candidate(self.job, store, ranks)
        with contextlib.closing(Probe(self.model, whole, self.measured)) as probe:
            return {
                "model": probe.measure(whole) | {"tokens": probe.tokens},
                "factored": probe.measure(made) | {"tokens": probe.tokens},
            }
