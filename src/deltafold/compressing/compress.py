"""`compress`: a fine-tune beside its base becomes an archive.

The recipe: pair the tensors, survey them (one read of both checkpoints), decide who gets how many
bytes, factor what wants factors, allot, encode, assemble. Every step works tensor by tensor and
leaves its result in the workspace, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

from deltafold.archive import Archive
from deltafold.codecs import get
from deltafold.compressing.adapter import whole_model
from deltafold.compressing.assemble import assemble
from deltafold.compressing.choosing import searched
from deltafold.compressing.distill import check_distill
from deltafold.compressing.distill import distill as distill_pieces
from deltafold.compressing.encode import encode_lossy
from deltafold.compressing.evidence import gather_evidence
from deltafold.compressing.job import CompressJob, budget_of
from deltafold.compressing.order import check_order
from deltafold.compressing.pair import open_pair
from deltafold.compressing.plan import planned
from deltafold.compressing.recording import compress_record
from deltafold.compressing.request import CompressRequest
from deltafold.compressing.schedule import schedule
from deltafold.compressing.scores import check_tasks, with_scores
from deltafold.compressing.search import encode_to_size
from deltafold.running.front import front
from deltafold.running.record import Record
from deltafold.running.run import Run


def run_compress(request: CompressRequest) -> Record:
    """Compress; find what was left open first, and answer tasks after. Raises DeltafoldError."""
    if request.dry_run:
        return planned(request)
    with whole_model(request.base, request.finetuned) as finetuned:
        request = request.but(finetuned=finetuned)
        if request.tasks:
            check_tasks(request)
        if request.open_settings or request.kl_at_most is not None:
            record = searched(request, archive_of)
        else:
            record = archive_of(request)
        return with_scores(record, request) if request.tasks else record


compress = front("compress", CompressRequest, run_compress)


def archive_of(request: CompressRequest) -> Record:
    """One archive, every setting of which is known."""
    with Run("compress", request, [request.base, request.finetuned]) as run:
        budget = budget_of(request.method, *request.budget)
        check_distill(request.steps, request.method)
        config = get(request.method).Config.from_options(request.method, request.method_settings)
        pair = run.entered(open_pair(request.base, request.finetuned))
        if not request.as_given:
            check_order(pair, run.output)
        known = gather_evidence(request, pair.finetuned, pair.alignment.wrapped)
        job = CompressJob(pair, request, config, budget, known)
        workspace = run.begin(job.identity(), job.disk_needed_bytes)
        resources = run.resources
        plan = schedule(job, workspace, resources)
        if plan.lossy and job.codec(job.method).variable:
            encode_to_size(job, plan, workspace, resources)
        else:
            encode_lossy(job, plan, workspace, resources)
        distilled = distill_pieces(job, plan, workspace, resources) if request.steps else None
        assemble(job, plan, workspace, resources)
        run.publish("archive")
        with Archive(run.output) as archive:
            content = compress_record(job, plan, archive, run.output)
        content["calibration"] = known.to_record()
        if distilled is not None:
            content["distill"] = distilled
        return run.record(content)
