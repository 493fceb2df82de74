"""`factor`: the matrices of one model become low-rank factors; fewer parameters at the same depth.

Text is run through the model block by block, each unit of matrices is factored and kept on disk, and
the model is written tensor by tensor: as factors, or with `dense` as the ordinary model that they
amount to. Memory holds one stretch of blocks' moments, hidden states as far as an allowance goes, and
one unit.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from deltafold.checkpoint import open_checkpoint
from deltafold.composed.write import SHARD_BYTES, shared_specs, stored_bytes, write_shared
from deltafold.errors import UsageError, nearest
from deltafold.factoring.form import factored_form
from deltafold.factoring.job import make_job
from deltafold.factoring.methods.presets import Method
from deltafold.factoring.ranks import shared_ranks
from deltafold.factoring.record import outcome, summary
from deltafold.factoring.work import Asked, Work
from deltafold.linalg.whitening import DAMPING
from deltafold.running.engine import Progress, Resources
from deltafold.running.record import (
    RECORD_VERSION,
    Meter,
    Record,
    check_record_path,
    machine,
    record_path,
    write_record,
)
from deltafold.running.stored import storable
from deltafold.running.workspace import Workspace, check_output, check_space

GROUPINGS = ("neighbours", "alike")


@storable
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
    calibration: str | Path = "pages",
    samples: int = 256,
    max_tokens: int = 128,
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
        work = Work(job, asked, workspace, resources)
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
