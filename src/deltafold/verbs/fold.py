"""`fold`: alike blocks of one model become fewer; the result is an ordinary, shallower checkpoint.

Text is run through the model block by block, blocks are chosen and folded in a draft that computes
tensors when they are read, and the draft is written, tensor by tensor. Memory holds one block, hidden
states as far as an allowance goes, and one tensor; nothing is written before all is decided.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration import Sample, StreamedModel, gather_samples
from deltafold.checkpoint import Checkpoint, open_checkpoint
from deltafold.engine import Progress
from deltafold.errors import UsageError, nearest
from deltafold.folding.draft import Draft
from deltafold.folding.mka import embeddings
from deltafold.folding.presets import AUTO, Method
from deltafold.record import (
    RECORD_VERSION,
    Meter,
    Record,
    check_record_path,
    machine,
    record_path,
    write_record,
)
from deltafold.verbs.fold_auto import fold_best
from deltafold.verbs.fold_explain import check_explain, write_explanation
from deltafold.verbs.fold_job import Job, make_job
from deltafold.verbs.fold_patch import Patcher
from deltafold.verbs.fold_states import POOLS, Pool, Probe, States, pooled_rows
from deltafold.verbs.fold_work import Folded, Folder
from deltafold.verbs.fold_write import write_draft
from deltafold.verbs.workspace import Workspace, check_output, check_space

SHARD_BYTES = 5_000_000_000
HEALINGS = ("none", "cut", "through")


def fold(
    model: str | Path,
    output: str | Path,
    method: str = AUTO,
    *,
    blocks: int | None = None,
    parameters: float | None = None,
    similarity: str | None = None,
    selection: str | None = None,
    rule: str | None = None,
    protect: Sequence[int] = (),
    closed_form: str | None = None,
    calibration: str | Path = "general",
    samples: int = 128,
    max_tokens: int = 256,
    pool: Pool = "last",
    seed: int = 0,
    measure: str | Path | None = None,
    explain: str | Path | None = None,
    dry_run: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
    record: str | Path | None = None,
) -> Record:
    """Fold a model into the folder `output`, by `blocks` that go or the share of `parameters` kept.

    `closed_form` heals by least squares: `none`, at each `cut`, or from there `through` the model;
    None leaves it to the method. `measure` is a text to measure perplexity and KL on, which should not
    be that of `calibration`. `dry_run` reads headers only and writes nothing. Returns the
    record. Raises DeltafoldError; nothing is left under `output` then.

    >>> record = fold("smollm2/", "smaller/", "mka", blocks=6)                  # doctest: +SKIP
    >>> record["removed"]["blocks"]                                             # doctest: +SKIP
    """
    out = Path(output)
    chosen = Method.of(method, similarity, selection, rule)
    _check_settings(closed_form, pool, seed)
    if not dry_run:
        check_output(out, overwrite, [model])
        check_record_path(record)
        check_explain(explain)
    settings = {
        "closed_form": closed_form,
        "protect": list(protect),
        "calibration": str(calibration),
        "samples": samples,
        "max_tokens": max_tokens,
        "pool": pool,
        "seed": seed,
    }
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter())
        checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(model)))
        job = make_job(checkpoint, chosen, blocks, parameters, protect)
        if dry_run:
            return _summary(job, checkpoint) | {"kind": "fold-plan", "settings": settings}
        check_space(out, checkpoint.total_bytes)
        identity = {
            "command": "fold",
            "model": checkpoint.fingerprint(),
            "method": chosen.to_json(),
            "count": job.count,
            "shards": shard_bytes,
            **settings,
        }
        workspace = stack.enter_context(Workspace(out, identity, restart))
        run = _Run(job, checkpoint, seed, pool, memory_bytes, progress, workspace.folder)
        stack.enter_context(contextlib.closing(run))
        run.read_text(calibration, samples, max_tokens, closed_form)
        folded = run.fold(closed_form)
        quality = run.quality(folded, measure, samples, max_tokens)
        points = run.manifold() if explain is not None else None
        folder = workspace.folder / "folded"
        write_draft(folded.draft, checkpoint, folder, shard_bytes, workers, memory_bytes, progress)
        workspace.publish("folded", overwrite)
        if explain is not None:
            write_explanation(Path(explain), folded, points)
    result = (
        {"record_version": RECORD_VERSION, "kind": "fold"}
        | _summary(job, checkpoint)
        | outcome(job, folded)
        | {
            "output": str(out),
            "settings": settings,
            "samples": run.sizes,
            "quality": quality,
            "seconds": meter.seconds,
            "peak_memory_bytes": meter.peak_memory_bytes,
            "machine": machine(),
        }
    )
    write_record(result, Path(record) if record else record_path(out))
    return result


def _check_settings(closed_form: str | None, pool: str, seed: int) -> None:
    if closed_form is not None and closed_form not in HEALINGS:
        raise UsageError(
            f"There is no healing {closed_form!r}; {nearest(closed_form, list(HEALINGS))}"
        )
    if pool not in POOLS:
        raise UsageError(f"There is no pooling {pool!r}; {nearest(pool, list(POOLS))}")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {seed}.")


class _Run:
    """The text of one run, opened when it is needed, and what is done with it."""

    def __init__(
        self,
        job: Job,
        checkpoint: Checkpoint,
        seed: int,
        pool: Pool,
        memory_bytes: int | None,
        progress: Progress | None,
        scratch: Path,
    ):
        self.job, self.checkpoint, self.seed, self.pool = job, checkpoint, seed, pool
        self.memory_bytes, self.progress, self.scratch = memory_bytes, progress, scratch
        self.whole = Draft.of(job.layout, checkpoint.tensor)
        self.states: States | None = None
        self._probe: Probe | None = None

    def close(self) -> None:
        """Free what the probe holds."""
        if self._probe is not None:
            self._probe.close()

    @property
    def sizes(self) -> dict[str, int] | None:
        """Samples and tokens that were run through the model."""
        if self.states is None:
            return None
        tokens = sum(len(sample.ids) for sample in self.states.samples)
        return {"samples": len(self.states.samples), "tokens": tokens}

    def read_text(
        self, source: str | Path, samples: int, max_tokens: int, closed_form: str | None
    ) -> None:
        """Samples for a method that needs them. Raises UsageError where none are allowed."""
        method = self.job.method
        needed = (
            self.job.is_auto
            or method.uses_matrix
            or method.chooser.needs != "nothing"
            or method.rule.patch != "none"
            or closed_form not in (None, "none")
        )
        if not needed:
            return
        if str(source) == "none":
            raise UsageError(
                f"{method.name} looks at what the model does on text; give --calibration a file, "
                "or leave it out for the text that comes with deltafold."
            )
        self.states = States(self.model, self._samples(source, samples, max_tokens))

    @functools.cached_property
    def model(self) -> StreamedModel:
        """The model, to be run block by block."""
        return StreamedModel(self.checkpoint, memory_bytes=self.memory_bytes, scratch=self.scratch)

    def _samples(self, source: str | Path, samples: int, max_tokens: int) -> list[Sample]:
        return gather_samples(
            self.model, source, samples=samples, max_tokens=max_tokens, seed=self.seed,
            memory_bytes=self.memory_bytes,
        )  # fmt: skip

    def quality(
        self, folded: Folded, text: str | Path | None, samples: int, max_tokens: int
    ) -> dict[str, dict[str, float]]:
        """Perplexity, KL to the model, and agreement with it, stage by stage; none without a text."""
        if text is None:
            return {}
        stages = {"model": self.whole, "unhealed": folded.unhealed, "folded": folded.draft}
        probe = Probe(self.model, self.whole, self._samples(text, samples, max_tokens))
        with contextlib.closing(probe):
            return {
                name: probe.measure(draft) | {"tokens": probe.tokens}
                for name, draft in stages.items()
                if draft is not None
            }

    def probe(self) -> Probe:
        """Few samples, for what is measured many times."""
        if self._probe is None:
            assert self.states is not None
            self._probe = Probe(self.states.model, self.whole, self.states.few())
        return self._probe

    def manifold(self) -> torch.Tensor | None:
        """The model's states (s, n, d) on MKA's manifold; None for a method without text."""
        if self.states is None:
            return None
        with self.states.run(self.whole) as done:
            return embeddings(pooled_rows(done, self.pool))

    def fold(self, closed_form: str | None) -> Folded:
        """Choose, fold, patch."""
        if self.job.is_auto:
            assert self.states is not None
            return fold_best(self.job, self.states, self.whole, closed_form, self.probe, self.seed,
                             self.progress)  # fmt: skip
        folder = Folder(self.job, self.states, self.probe, self.seed, self.pool, self.progress)
        folded = folder.fold(self.whole)
        kinds: list[tuple[Any, Any]] = []
        if self.job.method.rule.patch != "none":
            kinds.append((self.job.method.rule.patch, "cut"))
        if closed_form in ("cut", "through"):
            kinds.append(("heal", closed_form))
        if kinds:
            assert self.states is not None
            with contextlib.closing(Patcher(self.states, self.whole)) as patcher:
                folded.unhealed = folded.draft
                for kind, reach in kinds:
                    folded.draft, rows = patcher.patched(folded.draft, kind, reach)
                    folded.patches += rows
        return folded


def _summary(job: Job, checkpoint: Checkpoint) -> Record:
    """What is known before any work."""
    layout = job.layout
    return {
        "model": checkpoint.label,
        "method": job.method.to_json(),
        "blocks": layout.depth,
        "block_parameters": layout.parameters,
        "parameters": layout.total,
        "asked": {"blocks": job.count, "layer_share": job.count / layout.depth,
                  "parameter_share": job.share_removed},
    }  # fmt: skip


def outcome(job: Job, folded: Folded) -> Record:
    """What went: by blocks, and by parameters. Silenced sub-layers are still stored, as zeros."""
    layout, draft = job.layout, folded.draft
    gone = [number for number in range(layout.depth) if number not in draft.numbers]
    idle = sum(layout.part_parameters(part) for _, part in folded.silenced)
    return {
        "removed": {
            "blocks": gone,
            "layer_share": len(gone) / layout.depth,
            "parameters": len(gone) * layout.parameters,
            "parameter_share": len(gone) * layout.parameters / layout.total,
        },
        "silenced": [{"block": number, "part": part} for number, part in folded.silenced],
        "silenced_parameter_share": idle / layout.total,
        "kept": draft.numbers,
        "parts": [{"block": block.number, "parts": list(block.parts)} for block in draft.blocks],
        "steps": folded.steps,
        "patches": folded.patches,
        "similarity": _first_matrix(job, folded),
        **folded.notes,
    }


def _first_matrix(job: Job, folded: Folded) -> Record | None:
    """The similarity matrix over the model's states, before any step."""
    if not folded.matrices:
        return None
    rows = folded.matrices[0][1].tolist()
    return {
        "name": job.method.preset.similarity,
        "values": [[float(f"{value:.6g}") for value in row] for row in rows],
    }
