"""`share`: blocks of one model refer to earlier blocks and keep small deltas, which are then trained.

plan    which blocks refer to which, at what rank                     sharing/methods/plan.py
start   factors of what the blocks differ by                          sharing/start.py
search  (if asked) numbers of the training, by short trainings        sharing/search.py
train   teacher and student in one model, module after module         sharing/train.py, training/
write   the base's tensors but those shared, the factors, the form    composed/write.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deltafold.checkpoint import open_checkpoint
from deltafold.composed.write import Source, write_shared
from deltafold.evaluation.before_after import scored, weight_bytes
from deltafold.running.devices import steady
from deltafold.running.front import front
from deltafold.running.record import Record
from deltafold.running.run import Run
from deltafold.sharing.job import plan_sharing, structure_of
from deltafold.sharing.methods.plan import make_plan
from deltafold.sharing.record import plan_record
from deltafold.sharing.request import ShareRequest
from deltafold.sharing.run import ShareRun
from deltafold.sharing.search import check_search
from deltafold.training import Processes


def run_share(request: ShareRequest) -> Record:
    """Share, and answer tasks before and after where the request has some. Raises DeltafoldError."""
    return scored(request, _run, "shared")


share = front("share", ShareRequest, run_share)


def _run(request: ShareRequest) -> Record:
    request = request.but(row_scale=request.scales_rows, trial_steps=request.steps_of_trial)
    if request.trials:
        check_search()
    processes = Processes.here()
    if not processes.is_main:
        request = request.but(progress=None)
    with Run("share", request, [request.model], leads=processes.is_main) as run:
        if request.dry_run:
            return plan_sharing(request) | {"settings": request.settings()}
        structure = structure_of(request.model)
        if processes.device().type == "cuda":  # whether it was asked for, or is just there
            run.entered(steady())
        checkpoint = run.opened(open_checkpoint(request.model))
        if request.placement != "searched":
            make_plan(structure, request)  # what cannot be is refused before any work
        workspace = None
        if processes.is_main:
            identity = _identity(request, checkpoint.fingerprint(), processes.world)
            workspace = run.begin(identity, checkpoint.total_bytes)
        source = Source.of(checkpoint)
        share_run = ShareRun(request, structure, source, processes, run.resources, workspace)
        result = share_run.do()
        if processes.is_main:
            result["checked"] = _write(share_run, run)
        processes.end()
        content = plan_record(share_run.plan) | {"kind": "share", "output": str(run.output)}
        content |= {"settings": request.settings(), **result}
        content |= {"base_weight_bytes": checkpoint.weight_bytes, "processes": processes.world}
        content |= {"left_out": checkpoint.left_out}
        if processes.is_main:
            content["weight_bytes"] = weight_bytes(run.output)
        return run.record(content)


def _identity(request: ShareRequest, fingerprint: str, world: int) -> dict[str, Any]:
    return {
        "command": "share",
        "model": fingerprint,
        "method": request.method,
        "world": world,
        **request.identity(),
    }


def _write(share_run: ShareRun, run: Run) -> Record:
    """By this process alone: what was trained is in its memory, and is not sent about.

    Returns the record's row of how it opens.
    """
    request, resources = share_run.request, replace(run.resources, engine=None)
    checked = write_shared(
        share_run.source, share_run.plan.form(), share_run.values.__getitem__,
        run.workspace.new_folder("shared"), changed=share_run.changed, dense=request.dense,
        shard_bytes=request.shard_bytes, resources=resources,
    )  # fmt: skip
    run.publish("shared")
    return checked
