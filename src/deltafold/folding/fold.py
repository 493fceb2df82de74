"""`fold`: alike blocks of one model become fewer; the result is an ordinary, shallower checkpoint.

Text is run through the model block by block, blocks are chosen and folded in a draft that computes
tensors when they are read, and the draft is written, tensor by tensor. Memory holds one block, hidden
states as far as an allowance goes, and one tensor; nothing is written before all is decided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from deltafold.checkpoint import open_checkpoint
from deltafold.errors import UsageError, nearest
from deltafold.folding.explain import check_explain, write_explanation
from deltafold.folding.job import make_job
from deltafold.folding.methods.presets import AUTO, Method
from deltafold.folding.quantize import check_quantize, perplexity_of, quantize_folder
from deltafold.folding.record import outcome, summary
from deltafold.folding.run import Run, Texts
from deltafold.folding.states import POOLS, Pool
from deltafold.folding.train import distill_folder
from deltafold.folding.write import write_draft
from deltafold.running.engine import Progress
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

SHARD_BYTES = 5_000_000_000
HEALINGS = ("none", "cut", "through")


@storable
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
    heal: int = 0,
    calibration: str | Path = "pages",
    samples: int = 256,
    max_tokens: int = 128,
    pool: Pool = "last",
    seed: int = 0,
    quantize: str | None = None,
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
    None leaves it to the method. `heal` is a number of steps in which what is left is trained
    towards the model, both in memory. `quantize` is `int8` or `int4`, by torchao.
    `measure` is a text to measure perplexity and KL on, which should not be that of `calibration`.
    `dry_run` reads headers only and writes nothing. Returns the record. Raises DeltafoldError;
    nothing is left under `output` then.

    >>> record = fold("smollm2/", "smaller/", "mka", blocks=6)                  # doctest: +SKIP
    >>> record["removed"]["blocks"]                                             # doctest: +SKIP
    """
    out = Path(output)
    chosen = Method.of(method, similarity, selection, rule)
    closed_form = closed_form or chosen.preset.closed_form
    _check_settings(closed_form, heal, pool, seed)
    check_quantize(quantize)
    if not dry_run:
        check_output(out, overwrite, [model])
        check_record_path(record)
        check_explain(explain)
    settings = {
        "closed_form": closed_form,
        "heal": heal,
        "protect": list(protect),
        "calibration": str(calibration),
        "samples": samples,
        "max_tokens": max_tokens,
        "pool": pool,
        "seed": seed,
        "quantize": quantize,
    }
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter())
        checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(model)))
        job = make_job(checkpoint, chosen, blocks, parameters, protect)
        if dry_run:
            return summary(job, checkpoint) | {"kind": "fold-plan", "settings": settings}
        check_space(out, checkpoint.total_bytes)
        identity = {
            "command": "fold",
            "model": checkpoint.fingerprint(),
            "method": chosen.to_json(),
            "count": job.count,
            "goal": job.goal,
            "shards": shard_bytes,
            **settings,
        }
        workspace = stack.enter_context(Workspace(out, identity, restart))
        texts = Texts(calibration, measure, samples, max_tokens)
        run = Run(job, checkpoint, texts, seed, pool, memory_bytes, progress, workspace.folder)
        stack.enter_context(contextlib.closing(run))
        run.read_text(closed_form, heal)
        folded = run.fold(closed_form)
        points = run.manifold() if explain is not None else None
        done, healed = workspace.folder / "folded", None
        write_draft(folded.draft, checkpoint, done, shard_bytes, workers, memory_bytes, progress)
        if heal:
            run.release()
            made = workspace.folder / "healed"
            assert run.states is not None
            folded.notes["healing"] = distill_folder(
                checkpoint.path, done, made, run.states.samples, heal, seed, workspace,
                shard_bytes, progress,
            )  # fmt: skip
            done, healed = made, stack.enter_context(contextlib.closing(open_checkpoint(made)))
        quality = run.quality(folded, healed)
        if quantize is not None:
            made = workspace.folder / "quantised"
            quantize_folder(done, made, quantize)
            if run.measured:
                quality["quantised"] = {"perplexity": perplexity_of(made, run.measured)}
            done = made
        workspace.publish(done.name, overwrite)
        if explain is not None:
            write_explanation(Path(explain), folded, points)
    result = (
        {"record_version": RECORD_VERSION, "kind": "fold"}
        | summary(job, checkpoint)
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


def _check_settings(closed_form: str, heal: int, pool: str, seed: int) -> None:
    if heal < 0:
        raise UsageError(f"{heal} steps of healing cannot be; give 0 or more.")
    if closed_form not in HEALINGS:
        raise UsageError(
            f"There is no healing {closed_form!r}; {nearest(closed_form, list(HEALINGS))}"
        )
    if pool not in POOLS:
        raise UsageError(f"There is no pooling {pool!r}; {nearest(pool, list(POOLS))}")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {seed}.")
