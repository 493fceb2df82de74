"""`compress`: a fine-tune beside its base becomes an archive.

The recipe: pair the tensors, survey them (one read of both checkpoints), decide who gets how many
bytes, factor what wants factors, allot, encode, assemble. Every step works tensor by tensor and
leaves its result in the workspace, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltafold.archive import Archive
from deltafold.codecs import get
from deltafold.compressing.assemble import assemble
from deltafold.compressing.distill import check_distill
from deltafold.compressing.distill import distill as distill_pieces
from deltafold.compressing.encode import encode_lossy
from deltafold.compressing.evidence import Text
from deltafold.compressing.job import Job, budget_of
from deltafold.compressing.pair import open_pair
from deltafold.compressing.recording import compress_record
from deltafold.compressing.schedule import schedule
from deltafold.compressing.search import encode_to_size
from deltafold.errors import UsageError
from deltafold.running.cluster import check_engine, open_engine
from deltafold.running.devices import computes
from deltafold.running.engine import Progress, Resources
from deltafold.running.record import Meter, Record, check_record_path, record_path, write_record
from deltafold.running.stored import storable
from deltafold.running.workspace import Workspace, check_output, check_space


@storable
@computes
def compress(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    method: str = "auto",
    *,
    file_ratio: float | None = None,
    nominal_ratio: float | None = None,
    n_bytes: float | None = None,
    calibration: str | Path | None = None,
    samples: int = 128,
    max_tokens: int = 256,
    distill: int = 0,
    seed: int = 0,
    fallback: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    device: str | None = None,
    workers: int | None = None,
    memory_bytes: int | None = None,
    engine: str = "threads",
    progress: Progress | None = None,
    record: str | Path | None = None,
    **options: Any,
) -> Record:
    """Compress `finetuned` against `base` into the archive folder `output`; returns the record.

    Args:
        base, finetuned: local Hugging Face folders, safetensors files, or hub ids (`org/name@rev`).
        method: a codec's name, see `deltafold methods`.
        file_ratio, nominal_ratio, n_bytes: the budget, at most one; default file ratio 32.
        calibration: text that shows what errors cost, for methods that ask: a JSONL file of
            prompts (and answers), plain text, `datasets:NAME`, `self`, `general` (comes with
            deltafold) or `none`; at most `samples` samples of `max_tokens` tokens. By default
            `auto` takes `general`, and other methods none.
        distill: steps of training what is stored against the fine-tune's outputs on the
            calibration text (default `self`).
        seed: of the random positions.
        fallback: let a tensor that the method does not suit (nearly all values equal, flat
            spectrum) be stored by one that suits it.
        device: where heavy steps compute: `cpu` (default), `cuda`, `cuda:N` or `auto`. Bytes are the
            same each time on one device, not from one to another.
        workers: threads; memory_bytes: what tasks may hold together. Neither changes a byte.
        engine: `threads`, or `ray` for a cluster (see `running/cluster.py`); it changes no byte.
        record: where the run's record goes; default `OUTPUT.record.json`.
        options: the method's settings, e.g. `beta=0.6, c=1.0, value_dtype="fp16"`.

    Raises DeltafoldError (see `deltafold.errors`); nothing is left under `output` then.
    """
    out = Path(output)
    check_output(out, overwrite, [base, finetuned])
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {seed}.")
    check_record_path(record)
    check_engine(engine)
    budget = budget_of(method, file_ratio, nominal_ratio, n_bytes)
    check_distill(distill, method)
    config = get(method).Config.from_options(method, options)
    text = Text(calibration, samples, max_tokens, memory_bytes, restart, progress)
    with Meter() as meter, open_pair(base, finetuned) as pair:
        known = text.gather(pair.finetuned, method, distill)
        job = Job(pair, method, config, budget, seed, fallback, known)
        check_space(out, job.disk_needed_bytes)
        with (
            open_engine(engine, workers, memory_bytes) as runner,
            Workspace(out, job.identity(), restart) as workspace,
        ):
            resources = Resources(workers, memory_bytes, progress, runner)
            plan = schedule(job, workspace, resources)
            if plan.lossy and job.codec(job.method).variable:
                encode_to_size(job, plan, workspace, resources)
            else:
                encode_lossy(job, plan, workspace, resources)
            distilled = distill_pieces(job, plan, workspace, resources) if distill else None
            assemble(job, plan, workspace, resources)
            workspace.publish("archive", overwrite)
    with Archive(out) as archive:
        result = compress_record(job, plan, archive, out, meter)
    result["settings"]["workers"] = workers
    result["calibration"] = known.to_record()
    if distilled is not None:
        result["distill"] = distilled
    if runner:
        result["engine"] = runner.to_record()
    write_record(result, Path(record) if record else record_path(out))
    return result
