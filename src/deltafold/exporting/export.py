"""`export`: an archive becomes an adapter, for engines that run many fine-tunes over one base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deltafold.archive import Archive
from deltafold.checkpoint import Checkpoint, open_checkpoint
from deltafold.checkpoint.header import build_header
from deltafold.checkpoint.kinds import ADAPTER_CONFIG, ADAPTER_FILE
from deltafold.checkpoint.writer import CheckpointWriter, TensorSpec, guard_storage
from deltafold.errors import BudgetError, CheckpointError, UsageError
from deltafold.exporting.changed_base import BASE_FOLDER, write_folded_base
from deltafold.exporting.engines import (
    LLAMA_CPP,
    VLLM_RANKS,
    check_runtime,
    largest_rank,
    vllm_rank,
)
from deltafold.exporting.job import ExportJob, Item, make_job
from deltafold.exporting.methods.ranks import Choice
from deltafold.exporting.passes import (
    Factored,
    choose_ranks,
    chosen_pair,
    factor,
    pair_error,
    pair_specs,
)
from deltafold.exporting.peft_files import (
    adapter_config,
    config_text,
    pair_names,
    whole_name,
)
from deltafold.exporting.request import ExportRequest
from deltafold.linalg.matrices import Moments
from deltafold.names import block_of, role_of
from deltafold.restoring.decode import assembled, checked_rows
from deltafold.restoring.named import names_of
from deltafold.running.engine import Task
from deltafold.running.front import front
from deltafold.running.record import (
    Record,
)
from deltafold.running.run import Run
from deltafold.running.workspace import Workspace

FINISHED = "adapter"


def run_export(request: ExportRequest) -> Record:
    """Export what a request asks for; see `ExportRequest`."""
    choice, runtime = _checked(request)
    with AdapterRun("export", request, _sources(request)) as run:
        opened = run.entered(Archive(Path(request.archive)))
        checkpoint = run.opened(_open_base(opened, request.base))
        job = make_job(opened, checkpoint, choice, runtime, request.rest)
        if request.dry_run:
            return {"kind": "export-plan"} | _summary(job, request)
        identity = job.identity() | {"command": "export", **request.identity()}
        run.begin(identity, 0)
        made = _make(job, run, request)
        run.publish(made.pop("finished"))
        return run.record(_summary(job, request) | _outcome(job, made))


export = front("export", ExportRequest, run_export)


class AdapterRun(Run):
    """A run whose output may be a file: that of an earlier gguf export may be overwritten, too."""

    def check_output(self, sources: Sequence[str | Path]) -> None:
        """As for any run, but for such a file."""
        if self.request.overwrite and self.output.is_file() and self.output.suffix == ".gguf":
            return
        super().check_output(sources)


def _sources(request: ExportRequest) -> list[str | Path]:
    return [request.archive, *([request.base] if request.base else [])]


def _checked(request: ExportRequest) -> tuple[Choice, str]:
    """What ranks are chosen by, and what runs the adapter. Raises UsageError."""
    check_runtime(request.runtime)
    choice, rank = Choice(request.rank, request.energy, request.n_bytes), request.rank
    limit = largest_rank(request.runtime)
    if limit and rank and rank > limit:
        raise UsageError(f"vLLM takes ranks up to {limit}, not {rank}; lower --rank.")
    if request.to != "gguf-lora":
        return choice, request.runtime
    if request.rest == "fold":
        raise UsageError("--rest fold writes a base beside a peft adapter; give lora or drop.")
    return choice, LLAMA_CPP


def _open_base(archive: Archive, base: str | Path | None) -> Checkpoint:
    label, _ = names_of(archive)
    if not (base or label):
        raise UsageError(
            f"No record beside {archive.folder} says what its base is; give it with --base."
        )
    try:
        return open_checkpoint(base or label)
    except CheckpointError as error:
        if base is not None or error.passing:
            raise
        raise CheckpointError(
            f"{archive.folder} names {label} as its base, which is not found from here; give it "
            "with --base."
        ) from error


def _make(job: ExportJob, run: Run, request: ExportRequest) -> dict[str, Any]:
    """Everything under the workspace; what the record needs to know of it."""
    workspace = run.workspace
    judged, moments = _read_text(job, workspace, request)
    factored = factor(job, workspace, moments, run.resources)
    ranks = choose_ranks(job, factored, _free_bytes(job))
    kept = [item for item in job.of("pair") if ranks[item.name] > 0]
    folder = workspace.new_folder(FINISHED)
    errors = _write_peft(job, run, folder, kept, ranks)
    base = job.base.label
    if job.of("fold"):
        write_folded_base(job, folder / BASE_FOLDER, run.resources)
        base = str(run.output / BASE_FOLDER)
    by_module = {place.module: ranks[i.name] for i in kept for place in i.places}
    whole = {place.module for item in job.of("whole") for place in item.places}
    config = adapter_config(base, job.layout, by_module, whole)
    path = folder / ADAPTER_CONFIG
    guard_storage(path, lambda: path.write_text(config_text(config)))
    made: dict[str, Any] = {
        "factored": factored, "ranks": ranks, "errors": errors, "finished": FINISHED,
    }  # fmt: skip
    if judged is not None:
        candidates = {"adapter": _candidate(job, workspace, ranks), "base": _plain(job)}
        made["text"] = judged.judge(candidates, request.memory_bytes)
    if request.to == "gguf-lora":
        from deltafold.exporting.gguf import write_gguf_lora

        made |= write_gguf_lora(job, workspace, kept, ranks)
    made["adapter_bytes"] = sum(
        f.stat().st_size for f in _files(workspace.folder / made["finished"])
    )
    return made


def _files(path: Path) -> list[Path]:
    """The files of an adapter; a base beside it is counted apart."""
    return [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]


def _read_text(
    job: ExportJob, workspace: Workspace, request: ExportRequest
) -> tuple[Any, Mapping[str, Moments] | None]:
    if request.calibration is None:
        return None, None
    from deltafold.calibration.stream import default_memory_bytes
    from deltafold.exporting.text import ExportText

    text = ExportText(job, request, workspace.folder)
    allowance = (request.memory_bytes or default_memory_bytes()) // 2
    return text, text.moments(workspace.folder / "moments", allowance, request.progress)


def _whole_specs(job: ExportJob) -> list[tuple[Item, str, TensorSpec]]:
    found = []
    for item in job.of("whole"):
        name = whole_name(item.places[0].module, item.places[0].leaf)
        found.append((item, name, (name, item.tensor.dtype, item.tensor.shape)))
    return found


def _free_bytes(job: ExportJob) -> int:
    """What --bytes leaves for pairs, once header and tensors given whole are counted."""
    if job.choice.n_bytes is None:
        return 0
    specs = [spec for _, _, spec in _whole_specs(job)]
    taken = sum(math.prod(shape) * 4 for _, _, shape in specs)
    for item in job.of("pair"):
        for place, (a, b, dtype) in zip(item.places, pair_specs(job, item, 512), strict=True):
            specs += [(name, dtype, s) for name, s in zip(pair_names(place), (a, b), strict=True)]
    config_bytes = 600 + 200 * sum(len(item.places) for item in job.of("pair"))
    free = job.choice.n_bytes - taken - len(build_header(specs, None)[0]) - config_bytes
    if free <= 0:
        raise BudgetError(
            f"--bytes {job.choice.n_bytes:,} is less than what names and norms take; give at "
            f"least {job.choice.n_bytes - free + 1:,}."
        )
    return free


def _write_peft(
    job: ExportJob, run: Run, folder: Path, kept: list[Item], ranks: Mapping[str, int]
) -> dict[str, float]:
    """`adapter_model.safetensors`; |D - B A|^2 of each pair as it is written."""
    from deltafold.exporting.peft_files import pair_tensors

    specs: list[TensorSpec] = [spec for _, _, spec in _whole_specs(job)]
    for item in kept:
        for place, (a, b, dtype) in zip(
            item.places, pair_specs(job, item, ranks[item.name]), strict=True
        ):
            first, second = pair_names(place)
            specs += [(first, dtype, a), (second, dtype, b)]
    writer = CheckpointWriter(folder, {ADAPTER_FILE: sorted(specs)}, {"format": "pt"})
    workspace = run.workspace
    files = {item.name: f"errors/{number:06d}.json" for number, item in enumerate(kept)}

    def pair(item: Item) -> None:
        a, b = chosen_pair(job, workspace, item, ranks[item.name])
        for place in item.places:
            for name, tensor in pair_tensors(place, a, b).items():
                writer.write(name, tensor)
        workspace.save_json(files[item.name], pair_error(job, item, a, b))

    def whole(item: Item, name: str) -> None:
        writer.write(name, assembled(item.tensor, checked_rows(job.archive, item.tensor, job.base)))

    tasks = [
        Task(i.name, partial(pair, i), 16 * math.prod(i.shape), float(math.prod(i.shape)))
        for i in kept
    ]
    tasks += [Task(item.name, partial(whole, item, name)) for item, name, _ in _whole_specs(job)]
    try:
        run.resources.run("write", tasks)
        writer.finish(indexed=False)
    finally:
        writer.close()
    return {name: workspace.load_json(file) for name, file in files.items()}


def _candidate(job: ExportJob, workspace: Workspace, ranks: Mapping[str, int]) -> Any:
    """Weights of base + adapter: what PEFT computes with, fp32."""
    items = {item.name: item for item in job.items}

    def tensor(name: str) -> Any:
        item = items.get(name)
        if item is not None and item.how in ("whole", "fold") and item.tensor.base is not None:
            rows = job.base.tensors[name].shape[0]
            return assembled(item.tensor, checked_rows(job.archive, item.tensor, job.base))[:rows]
        found = job.base.tensor(name)
        if item is None or item.how != "pair" or not ranks[name]:
            return found
        a, b = chosen_pair(job, workspace, item, ranks[name])
        change = b.float().T @ a.float()
        found = found.float()
        found[: item.shape[1] if item.transposed else item.shape[0]] += (
            change.T if item.transposed else change
        )
        return found

    return tensor


def _plain(job: ExportJob) -> Any:
    return lambda name: job.base.tensor(name)


def _summary(job: ExportJob, request: ExportRequest) -> Record:
    """What is known before any work."""
    settings = request.settings()
    settings["bytes"] = settings.pop("n_bytes")
    return {
        "archive": str(job.archive.folder),
        "base": job.base.label,
        "output": str(request.output),
        "to": request.to,
        "for": job.runtime,
        "rest": job.rest,
        "method": job.archive.manifest.method,
        "settings": settings,
        "archive_bytes": job.archive.n_bytes,
        "checkpoint_bytes": job.archive.manifest.finetuned.total_bytes,
        "notes": list(job.notes),
    }


def _outcome(job: ExportJob, made: Mapping[str, Any]) -> Record:
    factored: Mapping[str, Factored] = made["factored"]
    rows = [_row(item, factored.get(item.name), made) for item in job.items]
    lost = sum(row["lost_squared"] for row in rows)
    total = sum(row["delta_squared"] for row in rows)
    ranks = [row["rank"] for row in rows if row["rank"]]
    result: Record = {
        "adapter_bytes": made["adapter_bytes"],
        "largest_rank": max(ranks, default=0),
        "relative_error": math.sqrt(lost / total) if total else 0.0,
        "relative_error_of_pairs": _pair_error(rows),
        "tensors": rows,
    }
    if ranks and max(ranks) <= VLLM_RANKS[-1]:
        result["vllm_max_lora_rank"] = vllm_rank(max(ranks))
    with contextlib.suppress(KeyError):
        result["text"] = made["text"]
    return result


def _pair_error(rows: list[dict[str, Any]]) -> float:
    """Relative error of the deltas that have a pair."""
    pairs = [row for row in rows if row["how"] == "pair"]
    total = sum(row["delta_squared"] for row in pairs)
    return math.sqrt(sum(row["lost_squared"] for row in pairs) / total) if total else 0.0


def _row(item: Item, found: Factored | None, made: Mapping[str, Any]) -> dict[str, Any]:
    squared = found.squared if found else 0.0
    rank = made["ranks"].get(item.name, 0)
    lost = made["errors"].get(item.name, squared) if item.how in ("pair", "none") else 0.0
    return {
        "name": item.name,
        "role": role_of(item.name),
        "block": block_of(item.name),
        "how": item.how,
        "modules": [place.module for place in item.places],
        "rank": rank,
        "from": found.source if found and rank else None,
        "delta_squared": squared,
        "lost_squared": lost,
        "relative_error": math.sqrt(lost / squared) if squared else None,
        "why": item.why or None,
    }
