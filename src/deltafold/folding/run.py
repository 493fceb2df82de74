"""One folding run over its text: what is run through the model, and what is done with it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration import Sample, StreamedModel
from deltafold.calibration.batches import sizes_of
from deltafold.calibration.gather import asked_samples
from deltafold.calibration.probe import Probe, few
from deltafold.checkpoint import Checkpoint
from deltafold.errors import UsageError
from deltafold.folding.job import FoldJob
from deltafold.folding.methods.draft import Draft
from deltafold.folding.methods.mka import embeddings
from deltafold.folding.patch import Patcher
from deltafold.folding.request import FoldRequest
from deltafold.folding.states import States, pooled_rows
from deltafold.folding.work import BlockFolder, Folded

LEAST_MEMORY = 1 << 28
"""Hidden states in memory may take as much as the model's file, or this; the rest is in a file."""


class FoldRun:
    """The text of one folding run, opened when it is needed, and what is done with it."""

    def __init__(self, job: FoldJob, checkpoint: Checkpoint, request: FoldRequest, scratch: Path):
        self.job, self.checkpoint, self.request, self.scratch = job, checkpoint, request, scratch
        self.whole = Draft.of(job.layout, checkpoint.tensor)
        self.states: States | None = None
        self.measured: list[Sample] = []
        self._probe: Probe | None = None

    def close(self) -> None:
        """Free states and what the probe holds."""
        self.release()

    def release(self) -> None:
        """Free what can be computed again."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self.states is not None:
            self.states.close()

    @property
    def sizes(self) -> dict[str, int] | None:
        """Samples and tokens that were run through the model."""
        return None if self.states is None else sizes_of(self.states.samples)

    def read(self) -> None:
        """Samples, as far as they are needed. Raises UsageError where a method may have none."""
        request, method = self.request, self.job.method
        if request.text is not None:
            self.measured = asked_samples(self.request, self.model, request.text)
        needed = (
            method.uses_matrix
            or method.chooser.needs != "nothing"
            or method.rule.patch != "none"
            or method.rule.looks
            or request.closed_form != "none"
            or request.steps
        )
        if not needed:
            return
        if str(request.calibration) == "none":
            raise UsageError(
                f"{'--steps' if request.steps else method.name} looks at what the model does on text; give "
                "--calibration a file, or leave it out for the text that comes with deltafold."
            )
        self.states = States(
            self.model, asked_samples(self.request, self.model, request.calibration)
        )

    @functools.cached_property
    def model(self) -> StreamedModel:
        """The model, to be run block by block."""
        memory = self.request.memory_bytes or max(LEAST_MEMORY, self.checkpoint.weight_bytes)
        return StreamedModel(self.checkpoint, memory_bytes=memory, scratch=self.scratch, mixed=True)

    def quality(
        self, folded: Folded, written: Mapping[str, Checkpoint]
    ) -> dict[str, dict[str, float]]:
        """Perplexity, KL to the model, and agreement with it, stage by stage; none without a text.

        `written` are the folders in which the last stages lie: these are what is measured.
        """
        if not self.measured:
            return {}
        stages = {"model": self.whole, "unhealed": folded.unhealed}
        memory, scratch = self.model.memory_bytes, self.scratch
        with contextlib.closing(Probe(self.model.exact(), self.whole, self.measured)) as probe:
            found = {
                name: probe.measure(draft) for name, draft in stages.items() if draft is not None
            }
            for name, each in written.items():
                made = StreamedModel(each, memory_bytes=memory, scratch=scratch)
                found[name] = probe.measure_model(made)
            return {name: row | {"tokens": probe.tokens} for name, row in found.items()}

    def probe(self) -> Probe:
        """Few samples, for what is measured many times."""
        if self._probe is None:
            assert self.states is not None
            self._probe = Probe(self.states.model, self.whole, few(self.states.samples))
        return self._probe

    def manifold(self) -> torch.Tensor | None:
        """The model's states (s, n, d) on MKA's manifold; None for a method without text."""
        if self.states is None:
            return None
        with self.states.run(self.whole) as done:
            return embeddings(pooled_rows(done, self.request.pool))

    def fold(self) -> Folded:
        """Choose, fold, patch."""
        closed_form, rule = self.request.closed_form or "none", self.job.method.rule
        folded = BlockFolder(self.job, self.states, self.probe, self.request).fold(self.whole)
        kinds: list[tuple[Any, Any]] = []
        if rule.patch != "none":
            kinds.append((rule.patch, "cut"))
        if closed_form != "none":
            kinds.append(("heal", closed_form))
        if kinds:
            assert self.states is not None
            patcher = Patcher(self.states, self.whole, self.request.progress)
            folded.unhealed = folded.draft
            for kind, reach in kinds:
                folded.draft, rows = patcher.patched(folded.draft, kind, reach)
                folded.patches += rows
                if kind == "heal" and not any(row["kept"] for row in rows):
                    folded.notes["unhealed_because"] = patcher.why_nothing(rows)
        return folded
