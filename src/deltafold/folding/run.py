"""One folding run over its text: what is run through the model, and what is done with it."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration import Sample, StreamedModel, gather_samples
from deltafold.calibration.probe import Probe, few
from deltafold.checkpoint import Checkpoint
from deltafold.errors import UsageError
from deltafold.folding.job import Job
from deltafold.folding.methods.draft import Draft
from deltafold.folding.methods.mka import embeddings
from deltafold.folding.patch import Patcher
from deltafold.folding.states import Pool, States, pooled_rows
from deltafold.folding.train import draft_of
from deltafold.folding.work import Folded, Folder
from deltafold.running.engine import Progress

LEAST_MEMORY = 1 << 28
"""Hidden states in memory may take as much as the model's file, or this; the rest is in a file."""


@dataclass(frozen=True)
class Texts:
    """Where text comes from, and how much of it: to choose and heal by, and to measure on."""

    calibration: str | Path
    measure: str | Path | None
    samples: int
    max_tokens: int


class Run:
    """The text of one run, opened when it is needed, and what is done with it."""

    def __init__(
        self,
        job: Job,
        checkpoint: Checkpoint,
        texts: Texts,
        seed: int,
        pool: Pool,
        memory_bytes: int | None,
        progress: Progress | None,
        scratch: Path,
    ):
        self.job, self.checkpoint, self.texts = job, checkpoint, texts
        self.seed, self.pool = seed, pool
        self.memory_bytes, self.progress, self.scratch = memory_bytes, progress, scratch
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
        if self.states is None:
            return None
        tokens = sum(len(sample.ids) for sample in self.states.samples)
        return {"samples": len(self.states.samples), "tokens": tokens}

    def read_text(self, closed_form: str, heal: int = 0) -> None:
        """Samples, as far as they are needed. Raises UsageError where a method may have none."""
        if self.texts.measure is not None:
            self.measured = self._samples(self.texts.measure)
        method = self.job.method
        needed = (
            method.uses_matrix
            or method.chooser.needs != "nothing"
            or method.rule.patch != "none"
            or closed_form != "none"
            or heal
        )
        if not needed:
            return
        if str(self.texts.calibration) == "none":
            raise UsageError(
                f"{'--heal' if heal else method.name} looks at what the model does on text; give "
                "--calibration a file, or leave it out for the text that comes with deltafold."
            )
        self.states = States(self.model, self._samples(self.texts.calibration))

    @functools.cached_property
    def model(self) -> StreamedModel:
        """The model, to be run block by block."""
        memory = self.memory_bytes or max(LEAST_MEMORY, self.checkpoint.weight_bytes)
        return StreamedModel(self.checkpoint, memory_bytes=memory, scratch=self.scratch, mixed=True)

    def _samples(self, source: str | Path) -> list[Sample]:
        return gather_samples(
            self.model,
            source,
            samples=self.texts.samples,
            max_tokens=self.texts.max_tokens,
            seed=self.seed,
            memory_bytes=self.memory_bytes,
        )

    def quality(
        self, folded: Folded, healed: Checkpoint | None = None
    ) -> dict[str, dict[str, float]]:
        """Perplexity, KL to the model, and agreement with it, stage by stage; none without a text."""
        if not self.measured:
            return {}
        stages = {"model": self.whole, "unhealed": folded.unhealed, "folded": folded.draft}
        if healed is not None:
            stages["healed"] = draft_of(folded.draft, healed)
        with contextlib.closing(Probe(self.model.exact(), self.whole, self.measured)) as probe:
            return {
                name: probe.measure(draft) | {"tokens": probe.tokens}
                for name, draft in stages.items()
                if draft is not None
            }

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
            return embeddings(pooled_rows(done, self.pool))

    def fold(self, closed_form: str) -> Folded:
        """Choose, fold, patch."""
        folder = Folder(self.job, self.states, self.probe, self.seed, self.pool, self.progress)
        folded = folder.fold(self.whole)
        kinds: list[tuple[Any, Any]] = []
        if self.job.method.rule.patch != "none":
            kinds.append((self.job.method.rule.patch, "cut"))
        if closed_form != "none":
            kinds.append(("heal", closed_form))
        if kinds:
            assert self.states is not None
            patcher = Patcher(self.states, self.whole, self.progress)
            folded.unhealed = folded.draft
            for kind, reach in kinds:
                folded.draft, rows = patcher.patched(folded.draft, kind, reach)
                folded.patches += rows
        return folded
