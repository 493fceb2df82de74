"""`fold`: alike blocks of one model become fewer; the result is an ordinary, shallower checkpoint.

Text is run through the model block by block, blocks are chosen and folded in a draft that computes
tensors when they are read, and the draft is written, tensor by tensor. Memory holds one block, hidden
states as far as an allowance goes, and one tensor; nothing is written before all is decided.
"""

from __future__ import annotations

from pathlib import Path

from deltafold.calibration.opens import check_opens
from deltafold.checkpoint import open_checkpoint
from deltafold.errors import UsageError
from deltafold.evaluation.before_after import scored
from deltafold.folding.explain import check_explain, write_explanation
from deltafold.folding.finish import write_checked
from deltafold.folding.job import FoldJob, make_job
from deltafold.folding.methods.presets import Method
from deltafold.folding.quantize import check_quantize, perplexity_of, quantize_folder
from deltafold.folding.record import outcome, summary
from deltafold.folding.request import FoldRequest
from deltafold.folding.run import FoldRun
from deltafold.folding.train import heal_folder
from deltafold.folding.work import Folded
from deltafold.running.front import front
from deltafold.running.record import Record
from deltafold.running.run import Run


def run_fold(request: FoldRequest) -> Record:
    """Fold, and answer tasks before and after where the request has some. Raises DeltafoldError."""
    return scored(request, _run, "folded")


fold = front("fold", FoldRequest, run_fold)


def _run(request: FoldRequest) -> Record:
    chosen = Method.of(request.method, request.similarity, request.selection, request.rule)
    request = request.but(
        closed_form=request.closed_form or chosen.preset.closed_form,
        protect=chosen.preset.protect if request.protect is None else request.protect,
    )
    if chosen.rule.patch == "scale" and request.closed_form != "none":
        raise UsageError(
            "The rule scale makes hidden states larger from a cut on, and --closed-form heals towards "
            "those of the model; take one of the two."
        )
    check_quantize(request.quantize)
    if not request.dry_run:
        check_explain(request.explain)
    with Run("fold", request, [request.model]) as run:
        checkpoint = run.opened(open_checkpoint(request.model))
        job = make_job(checkpoint, chosen, request)
        if request.dry_run:
            kind = {"kind": "fold-plan", "settings": request.settings()}
            return summary(job, checkpoint) | kind
        workspace = run.begin(
            _identity(request, job, checkpoint.fingerprint()), checkpoint.total_bytes
        )
        text = run.opened(FoldRun(job, checkpoint, request, workspace.folder))
        text.read()
        folded = text.fold()
        points = text.manifold() if request.explain is not None else None
        done, quality = _written(run, text, folded)
        run.publish(done.name)
        if request.explain is not None:
            write_explanation(Path(request.explain), folded, points)
        content = summary(job, checkpoint) | outcome(job, folded)
        content |= {"output": str(run.output), "settings": request.settings()}
        return run.record(content | {"samples": text.sizes, "quality": quality})


def _identity(request: FoldRequest, job: FoldJob, fingerprint: str) -> dict[str, object]:
    return {
        "command": "fold",
        "model": fingerprint,
        "method": job.method.to_json(),
        "count": job.count,
        "goal": job.goal,
        **request.identity(),
    }


def _written(run: Run, text: FoldRun, folded: Folded) -> tuple[Path, dict[str, dict[str, float]]]:
    """The folder in the workspace that is the result, and its quality: drafted, healed, quantised."""
    request, workspace, checkpoint = text.request, run.workspace, text.checkpoint
    done = workspace.new_folder("folded")
    folded.notes["checked"] = write_checked(
        folded.draft, checkpoint, done, workspace.folder, request.shard_bytes, run.resources
    )
    written = {"folded": run.opened(open_checkpoint(done))}
    if request.steps:
        text.release()
        made = workspace.new_folder("healed")
        folded.notes["healing"] = heal_folder(text, done, made, workspace)
        check_opens(made, checkpoint.label, checkpoint.path)
        done, written["healed"] = made, run.opened(open_checkpoint(made))
    quality = text.quality(folded, written)
    if request.quantize is not None:
        made = workspace.new_folder("quantised")
        quantize_folder(done, made, request.quantize)
        if text.measured:
            quality["quantised"] = {"perplexity": perplexity_of(made, text.measured)}
        done = made
    return done, quality
