"""`share`: blocks of one model refer to earlier blocks and keep small deltas, which are then trained.

plan    which blocks refer to which, at what rank                     sharing/methods/plan.py
start   factors of what the blocks differ by                          sharing/start.py
search  (if asked) numbers of the training, by short trainings        sharing/search.py
train   teacher and student in one model, module after module         sharing/train.py, training/
write   the base's tensors but those shared, the factors, the form    composed/write.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltafold.checkpoint import open_checkpoint
from deltafold.composed.write import SHARD_BYTES, Source, write_shared
from deltafold.errors import UsageError
from deltafold.running.devices import steady
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
from deltafold.sharing.job import plan_record, structure_of
from deltafold.sharing.methods.plan import (
    DELTA,
    MATRICES,
    PROTECTED,
    Request,
    make_plan,
    wants_scale,
)
from deltafold.sharing.methods.replacing import Schedule
from deltafold.sharing.run import Run, Texts
from deltafold.sharing.search import Numbers, check_search
from deltafold.sharing.start import check_start
from deltafold.sharing.train import check_tune
from deltafold.training import Processes, Settings


@storable
def share(
    model: str | Path,
    output: str | Path,
    method: str = DELTA,
    *,
    parameters: float | None = None,
    shared: int | None = None,
    rank: int | None = None,
    placement: str = "alternating",
    matrices: str = "mlp",
    protect: Sequence[int] = PROTECTED,
    split: float = 1.0,
    scale: bool | None = None,
    start: str = "svd",
    align: bool = False,
    train: str | Path | None = None,
    steps: int = 0,
    rate: float = 5e-4,
    batch: int = 8,
    kl_share: float = 0.5,
    temperature: float = 2.0,
    replace_from: float = 0.3,
    replace_until: float = 0.5,
    replace_stagger: float = 0.5,
    patience: int = 0,
    check_steps: int = 25,
    bf16: bool = False,
    recompute: bool = False,
    tune: str = "delta",
    search: int = 0,
    search_steps: int | None = None,
    samples: int | None = None,
    max_tokens: int = 256,
    measure: str | Path | None = None,
    seed: int = 0,
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
    """Write `model` into `output` with fewer stored parameters, at the same depth.

    Two of `parameters` (share kept), `shared` (blocks) and `rank` say how much, or `parameters` alone.
    `scale` lets each row of an anchor be scaled (default: unless `rank` is given). `start` is `svd`,
    `activation`, `fit` or `zero`; `align` first puts neurons into the anchor's order.
    `steps` of training on `train` (a text, a data set, `general`, or by default `self`: the model's
    own); 0 writes the start. `replace_*` are p0, f and w of the schedule. `tune` `all` trains every
    weight, with a second copy of the model as the teacher. `bf16` runs and measures in bf16. `search`
    tries numbers of the training first, so many times. `measure` is a text for perplexity and KL;
    without it, held-out text of `train`. `dense` writes the ordinary model that results. Returns the
    record. Raises DeltafoldError; nothing is left under `output` then.

    >>> share("smollm2/", "shared/", parameters=0.88, train="text.jsonl", steps=500)  # doctest: +SKIP
    """
    out = Path(output)
    scale = wants_scale(scale, rank)
    request = Request(
        method, shared, rank, parameters, placement, matrices, tuple(protect), split, scale
    )
    request.check()
    check_start(start, align, MATRICES[matrices])
    check_tune(tune)
    schedule = Schedule(replace_from, replace_until, replace_stagger)
    schedule.check()
    numbers = Numbers(
        Settings(
            max(1, steps), rate, batch, kl_share, temperature,
            check_steps=check_steps, patience=patience, earliest_stop=round(replace_until * steps),
            seed=seed,
        ),
        schedule,
        request,
    )  # fmt: skip
    numbers.settings.check()
    _check(steps, search, seed, train)
    processes = Processes.here()
    if not dry_run and processes.is_main:
        check_output(out, overwrite, [model])
        check_record_path(record)
    settings = {
        "start": start, "align": align, "train": None if train is None else str(train),
        "steps": steps, "batch": batch, "patience": patience, "check_steps": check_steps,
        "bf16": bf16, "recompute": recompute, "tune": tune, "search": search,
        "search_steps": search_steps or max(1, steps // 4), "samples": samples,
        "max_tokens": max_tokens, "measure": None if measure is None else str(measure),
        "protect": list(protect), "seed": seed, "dense": dense, **numbers.to_json(),
    }  # fmt: skip
    structure = structure_of(model)
    if dry_run:
        return plan_record(make_plan(structure, request)) | {"settings": settings}
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter())
        if processes.device().type == "cuda":  # whether it was asked for, or is just there
            stack.enter_context(steady())
        checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(model)))
        if placement != "searched":
            make_plan(structure, request)  # what cannot be is told before any work
        check_space(out, checkpoint.total_bytes)
        identity = {
            "command": "share", "model": checkpoint.fingerprint(), "method": method,
            "shared": shared, "rank": rank, "parameters": parameters, "placement": placement,
            "matrices": matrices, "scale": scale, "shards": shard_bytes, "world": processes.world, **settings,
        }  # fmt: skip
        workspace = None
        if processes.is_main:
            workspace = stack.enter_context(Workspace(out, identity, restart))
        run = Run(
            structure, Source.of(checkpoint), numbers,
            Texts(train, measure, samples, max_tokens), settings, workspace, processes,
            workers, memory_bytes, progress,
        )  # fmt: skip
        result = run.do()
        if workspace is not None:
            folder = workspace.folder / "shared"
            write_shared(
                run.source, run.plan.form(), run.values.__getitem__, folder, changed=run.changed,
                dense=dense, shard_bytes=shard_bytes, workers=workers, memory_bytes=memory_bytes,
                progress=progress,
            )  # fmt: skip
            workspace.publish("shared", overwrite)
        base_bytes = checkpoint.weight_bytes
    processes.end()
    done = (
        {"record_version": RECORD_VERSION}
        | plan_record(run.plan)
        | {"kind": "share", "output": str(out), "settings": settings}
        | result
        | {
            "base_weight_bytes": base_bytes,
            "seconds": meter.seconds,
            "peak_memory_bytes": meter.peak_memory_bytes,
            "machine": machine(),
            "processes": processes.world,
        }
    )
    if processes.is_main:
        done["weight_bytes"] = _weight_bytes(out)
        write_record(done, Path(record) if record else record_path(out))
    return done


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _check(steps: int, search: int, seed: int, train: Any) -> None:
    if steps < 0 or search < 0:
        raise UsageError("steps and search are numbers of 0 or more.")
    if search and not steps:
        raise UsageError("A search tries numbers of the training; give --steps, too.")
    if train is not None and not steps:
        raise UsageError("There is text to train on but no steps; give --steps (500).")
    if search:
        check_search()
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {seed}.")
