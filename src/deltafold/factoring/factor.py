"""`factor`: the matrices of one model become low-rank factors; fewer parameters at the same depth.

Text is run through the model block by block, each unit of matrices is factored and kept on disk, and
the model is written tensor by tensor: as factors, or with `dense` as the ordinary model that they
amount to. Memory holds one stretch of blocks' moments, hidden states as far as an allowance goes, and
one unit.
"""

from __future__ import annotations

from deltafold.checkpoint import open_checkpoint
from deltafold.composed.write import shared_specs, stored_bytes, write_shared
from deltafold.evaluation.before_after import scored
from deltafold.factoring.form import factored_form
from deltafold.factoring.job import FactorJob, make_job
from deltafold.factoring.methods.presets import Method
from deltafold.factoring.methods.units import Ranks
from deltafold.factoring.ranks import shared_ranks
from deltafold.factoring.record import outcome, summary
from deltafold.factoring.request import FactorRequest
from deltafold.factoring.run import FactorRun
from deltafold.factoring.store import FactorStore
from deltafold.running.front import front
from deltafold.running.record import Record
from deltafold.running.run import Run

FINISHED = "factored"


def run_factor(request: FactorRequest) -> Record:
    """Factor, and answer tasks before and after where the request has some. Raises DeltafoldError."""
    return scored(request, _run, "factored")


factor = front("factor", FactorRequest, run_factor)


def _run(request: FactorRequest) -> Record:
    chosen = Method.of(request.method)
    with Run("factor", request, [request.model]) as run:
        checkpoint = run.opened(open_checkpoint(request.model))
        job = make_job(checkpoint, chosen, request)
        if request.dry_run:
            ranks = shared_ranks(job) if chosen.ranking == "share" else None
            plan = {"kind": "factor-plan"} | summary(job, ranks)
            return plan | {"settings": request.settings()}
        workspace = run.begin(
            _identity(request, checkpoint.fingerprint()), 2 * checkpoint.total_bytes
        )
        factoring = FactorRun(job, request, workspace, run.resources)
        factoring.read()
        job, found, notes = factoring.ranks()
        store = factoring.factored(found)
        content = summary(job, found) | outcome(job, found, store)
        stored, content["checked"] = _write(run, job, found, store)
        if not request.dense:
            content["parameters"]["bytes"] = stored
        content |= {"quality": factoring.quality(found, store), "samples": factoring.sizes}
        run.publish(FINISHED)
        content |= {"output": str(run.output), "settings": request.settings(), "search": notes}
        return run.record(content)


def _identity(request: FactorRequest, fingerprint: str) -> dict[str, object]:
    return {
        "command": "factor",
        "model": fingerprint,
        "method": request.method,
        **request.identity(),
    }


def _write(run: Run, job: FactorJob, ranks: Ranks, store: FactorStore) -> tuple[int, Record]:
    """The model in the workspace: bytes of its tensors as factors, and how it opens."""
    request = job.request
    form = factored_form(job, ranks, request.parameters)
    checked = write_shared(
        job.source, form, store.tensor, run.workspace.new_folder(FINISHED),
        changed=store.changed(ranks), dense=request.dense, shard_bytes=request.shard_bytes,
        resources=run.resources,
    )  # fmt: skip
    return stored_bytes(shared_specs(job.source, form)), checked
