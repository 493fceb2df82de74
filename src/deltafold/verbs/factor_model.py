"""`factor`: the matrices of one model become low-rank factors; fewer parameters at the same depth.

Text is run through the model block by block, each unit of matrices is factored and kept on disk, and
the model is written tensor by tensor: as factors, or with `dense` as the ordinary model that they
amount to. Memory holds one stretch of blocks' moments, hidden states as far as an allowance goes, and
one unit.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

from deltafold.calibration import Calibration, StreamedModel, calibrate, gather_samples
from deltafold.calibration.batches import Sample
from deltafold.checkpoint import open_checkpoint
from deltafold.engine import Progress, Resources
from deltafold.errors import UsageError, nearest
from deltafold.factoring.presets import Method
from deltafold.factoring.units import Ranks
from deltafold.record import (
    RECORD_VERSION,
    Meter,
    Record,
    check_record_path,
    machine,
    record_path,
    write_record,
)
from deltafold.verbs.factor_form import factored_form
from deltafold.verbs.factor_groups import alike_groups
from deltafold.verbs.factor_job import Job, make_job
from deltafold.verbs.factor_parts import Settings
from deltafold.verbs.factor_ranks import Search, depth_ranks, shared_ranks, threshold_ranks
from deltafold.verbs.factor_record import outcome, summary
from deltafold.verbs.factor_run import Run
from deltafold.verbs.factor_store import Candidate, Store
from deltafold.verbs.fold_states import Probe, States, is_held
from deltafold.verbs.share_write import SHARD_BYTES, shared_specs, stored_bytes, write_shared
from deltafold.verbs.workspace import Workspace, check_output, check_space
from deltafold.whitening import DAMPING

GROUPINGS = ("neighbours", "alike")


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


def factor(
    model: str | Path,
    output: str | Path,
    method: str = "lord",
    *,
    parameters: float = 0.8,
    group: int = 2,
    grouping: str = "neighbours",
    sequential: bool = True,
    refit: bool = True,
    centre: bool = False,
    damping: float = DAMPING,
    trials: int = 24,
    calibration: str | Path = "general",
    samples: int = 128,
    max_tokens: int = 256,
    seed: int = 0,
    measure: str | Path | None = None,
    dense: bool = False,
    dry_run: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
    record: str | Path | None = None,
) -> Record:
    """Factor a model into the folder `output`; at most the share `parameters` of its numbers stays.

    `group` blocks share a basis where the method shares any, `grouping` says which: `neighbours`, or
    those with `alike` inputs. `sequential` fits each block to what the factored blocks before it make
    of the text. `centre` keeps the mean of outputs by a bias. `measure` is a text for perplexity and
    KL, which should not be that of `calibration`. `dry_run` reads headers only and writes nothing.
    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    >>> record = factor("smollm2/", "small/", "lord", parameters=0.8)           # doctest: +SKIP
    >>> record["parameters"]["kept"]                                            # doctest: +SKIP
    """
    out, chosen = Path(output), Method.of(method)
    asked = Asked(
        parameters, group, grouping, sequential, refit, centre, damping, trials, str(calibration),
        samples, max_tokens, seed, dense,
    )  # fmt: skip
    _check(asked, chosen)
    if not dry_run:
        check_output(out, overwrite, [model])
        check_record_path(record)
    settings = dict(asked.__dict__)
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter())
        checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(model)))
        job = make_job(checkpoint, chosen, parameters, centre and chosen.whitened, group)
        if dry_run:
            ranks = shared_ranks(job) if chosen.ranking == "share" else None
            return {"kind": "factor-plan"} | summary(job, ranks) | {"settings": settings}
        check_space(out, 2 * checkpoint.total_bytes)
        identity = {
            "command": "factor",
            "model": checkpoint.fingerprint(),
            "method": method,
            "shards": shard_bytes,
            **settings,
        }
        workspace = stack.enter_context(Workspace(out, identity, restart))
        resources = Resources(workers, memory_bytes, progress)
        work = _Work(job, asked, workspace, resources)
        work.read(measure)
        job, ranks, notes = work.ranks()
        store = work.factored(ranks)
        form = factored_form(job, ranks, asked.parameters)
        write_shared(
            job.source, form, store.tensor, workspace.folder / "factored",
            changed=store.changed(ranks), dense=dense, shard_bytes=shard_bytes, workers=workers,
            memory_bytes=memory_bytes, progress=progress,
        )  # fmt: skip
        quality = work.quality(ranks, store) if measure is not None else {}
        result: Record = (
            {"record_version": RECORD_VERSION, "kind": "factor"}
            | summary(job, ranks)
            | outcome(job, ranks, store)
        )
        if not dense:
            result["parameters"]["bytes"] = stored_bytes(shared_specs(job.source, form))
        workspace.publish("factored", overwrite)
    result |= {
        "output": str(out),
        "settings": settings,
        "search": notes,
        "samples": work.sizes,
        "quality": quality,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "machine": machine(),
    }
    write_record(result, Path(record) if record else record_path(out))
    return result


def _check(asked: Asked, method: Method) -> None:
    """Raises UsageError for settings that cannot be."""
    if asked.grouping not in GROUPINGS:
        raise UsageError(
            f"There is no grouping {asked.grouping!r}; {nearest(asked.grouping, list(GROUPINGS))}"
        )
    if not 0 <= asked.damping <= 1:
        raise UsageError(f"damping lies between 0 and 1, and {asked.damping:g} does not.")
    if asked.trials < 1:
        raise UsageError(f"{asked.trials} trials find nothing; give at least 1.")
    if not 0 <= asked.seed < 1 << 63:
        raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {asked.seed}.")
    if asked.centre and not method.whitened:
        raise UsageError(
            f"{method.name} does not look at inputs, so it has no mean to keep; leave out --centre, or "
            "choose lord."
        )
    if asked.calibration == "none" and (method.whitened or method.ranking == "search"):
        raise UsageError(
            f"{method.name} looks at the inputs of the layers; give --calibration a file, or leave "
            "it out for the text that comes with deltafold."
        )


class _Work:
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
        whole, count = Candidate(self.job, None, []), len(self.samples)
        held = States(self.model, States(self.model, self.samples).held_out()).few()
        seen = [each for n, each in enumerate(self.samples) if not is_held(n, count)]
        with contextlib.closing(Probe(self.model, whole, held)) as probe:
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
