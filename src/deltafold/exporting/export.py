"""`export`: an archive becomes an adapter, for engines that run many fine-tunes over one base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.archive import Archive
from deltafold.checkpoint import Checkpoint, open_checkpoint
from deltafold.checkpoint.header import build_header
from deltafold.checkpoint.writer import CheckpointWriter, TensorSpec, guard_storage
from deltafold.errors import BudgetError, CheckpointError, UsageError, nearest
from deltafold.exporting.changed_base import BASE_FOLDER, write_folded_base
from deltafold.exporting.engines import (
    LLAMA_CPP,
    VLLM_RANKS,
    check_engine,
    largest_rank,
    vllm_rank,
)
from deltafold.exporting.job import Item, Job, make_job
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
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    config_text,
    pair_names,
    whole_name,
)
from deltafold.linalg.matrices import Moments
from deltafold.names import block_of, role_of
from deltafold.restoring.decode import assembled, checked_rows
from deltafold.running.devices import computes
from deltafold.running.engine import Progress, Task, run_tasks
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
from deltafold.running.workspace import Workspace, check_output

FORMATS = ("peft", "gguf-lora")
FINISHED = "adapter"


@dataclass(frozen=True)
class Options:
    """What the work may use, and the text it is weighed and measured by."""

    text: str | Path | None
    samples: int
    max_tokens: int
    workers: int | None
    memory_bytes: int | None
    progress: Progress | None


@storable
@computes
def export(
    archive: str | Path,
    output: str | Path,
    to: str = "peft",
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    n_bytes: int | None = None,
    rest: str = "lora",
    engine: str = "peft",
    text: str | Path | None = None,
    samples: int = 32,
    max_tokens: int = 256,
    overwrite: bool = False,
    restart: bool = False,
    device: str | None = None,
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
    record: str | Path | None = None,
) -> Record:
    """Write the fine-tune of `archive` as a LoRA adapter of `base`; returns the record.

    `to` is `peft` (a folder) or `gguf-lora` (a file for llama.cpp). `base` defaults to the one that
    the archive names. Ranks: `rank`, or the fewest components that hold the share `energy` of each
    delta, or what keeps most in `n_bytes`; by default stored factors as they are, else rank 64.
    `rest`: norms, embeddings and head as pairs (`lora`), in a changed base beside the adapter
    (`fold`), or left out (`drop`). `engine` `vllm` leaves out what vLLM does not take. With `text`
    (as `gather_samples` takes it) pairs are fitted to the layers' inputs, and predictions of base +
    adapter are compared with the restored model's. `device` is where heavy steps compute: `cpu`
    (default), `cuda`, `cuda:N` or `auto`.

    Raises UsageError, BudgetError, MismatchError, ArchiveError, CheckpointError; nothing is left
    under `output` then.
    """
    out = Path(output)
    if to not in FORMATS:
        raise UsageError(f"There is no format {to!r}; {nearest(to, list(FORMATS))}")
    check_engine(engine)
    choice = Choice(rank, energy, n_bytes)
    limit = largest_rank(engine)
    if limit and rank and rank > limit:
        raise UsageError(f"vLLM takes ranks up to {limit}, not {rank}; lower --rank.")
    if to == "gguf-lora":
        if rest == "fold":
            raise UsageError("--rest fold writes a base beside a peft adapter; give lora or drop.")
        engine = LLAMA_CPP
    _check_adapter_output(out, overwrite, archive, base)
    check_record_path(record)
    options = Options(text, samples, max_tokens, workers, memory_bytes, progress)
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter())
        opened = stack.enter_context(Archive(Path(archive)))
        checkpoint = stack.enter_context(_open_base(opened, base))
        job = make_job(opened, checkpoint, choice, engine, rest)
        identity = job.identity() | {
            "command": "export", "to": to, "text": [str(text), samples, max_tokens],
        }  # fmt: skip
        with Workspace(out, identity, restart) as workspace:
            made = _make(job, workspace, out, to, options)
            workspace.publish(made.pop("finished"), overwrite)
        result = _record(job, out, to, made)
    result |= {"seconds": meter.seconds, "peak_memory_bytes": meter.peak_memory_bytes}
    write_record(result, Path(record) if record else record_path(out))
    return result


def _open_base(archive: Archive, base: str | Path | None) -> Checkpoint:
    label = archive.manifest.base.label
    try:
        return open_checkpoint(base or label)
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"{archive.folder} names {label} as its base, which is not found from here; give it "
            "with --base."
        ) from error


def _check_adapter_output(
    out: Path, overwrite: bool, archive: str | Path, base: str | Path | None
) -> None:
    """As `check_output`, but a file (of an earlier gguf export) may be overwritten too."""
    if overwrite and out.is_file() and out.suffix == ".gguf":
        return
    check_output(out, overwrite, [archive, *([base] if base else [])])


def _make(job: Job, workspace: Workspace, out: Path, to: str, options: Options) -> dict[str, Any]:
    """Everything under the workspace; what the record needs to know of it."""
    judged, moments = _read_text(job, workspace, options)
    factored = factor(
        job, workspace, moments, options.workers, options.memory_bytes, options.progress
    )
    ranks = choose_ranks(job, factored, _free_bytes(job))
    kept = [item for item in job.of("pair") if ranks[item.name] > 0]
    folder = workspace.folder / FINISHED
    guard_storage(folder, lambda: folder.mkdir(exist_ok=True))
    errors = _write_peft(job, workspace, folder, kept, ranks, options)
    base = job.base.label
    if job.of("fold"):
        write_folded_base(job, folder / BASE_FOLDER, options.workers, options.progress)
        base = str(out / BASE_FOLDER)
    by_module = {place.module: ranks[i.name] for i in kept for place in i.places}
    whole = {place.module for item in job.of("whole") for place in item.places}
    config = adapter_config(base, job.layout, by_module, whole)
    path = folder / CONFIG_FILE
    guard_storage(path, lambda: path.write_text(config_text(config)))
    made: dict[str, Any] = {
        "factored": factored, "ranks": ranks, "errors": errors, "finished": FINISHED,
    }  # fmt: skip
    if judged is not None:
        candidates = {"adapter": _candidate(job, workspace, ranks), "base": _plain(job)}
        made["text"] = judged.judge(candidates, options.memory_bytes)
    if to == "gguf-lora":
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
    job: Job, workspace: Workspace, options: Options
) -> tuple[Any, Mapping[str, Moments] | None]:
    if options.text is None:
        return None, None
    from deltafold.calibration.stream import default_memory_bytes
    from deltafold.exporting.text import Text

    text = Text(
        job, options.text, options.samples, options.max_tokens, workspace.folder,
        options.memory_bytes,
    )  # fmt: skip
    allowance = (options.memory_bytes or default_memory_bytes()) // 2
    return text, text.moments(workspace.folder / "moments", allowance, options.progress)


def _whole_specs(job: Job) -> list[tuple[Item, str, TensorSpec]]:
    found = []
    for item in job.of("whole"):
        leaf = item.name.rpartition(".")[2]
        name = whole_name(item.places[0].module, leaf)
        found.append((item, name, (name, item.tensor.dtype, item.tensor.shape)))
    return found


def _free_bytes(job: Job) -> int:
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
    job: Job,
    workspace: Workspace,
    folder: Path,
    kept: list[Item],
    ranks: Mapping[str, int],
    options: Options,
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
    writer = CheckpointWriter(folder, {WEIGHTS_FILE: sorted(specs)}, {"format": "pt"})
    errors: dict[str, float] = {}

    def pair(item: Item) -> None:
        a, b = chosen_pair(job, workspace, item, ranks[item.name])
        for place in item.places:
            for name, tensor in pair_tensors(place, a, b).items():
                writer.write(name, tensor)
        errors[item.name] = pair_error(job, item, a, b)

    def whole(item: Item, name: str) -> None:
        writer.write(name, assembled(item.tensor, checked_rows(job.archive, item.tensor, job.base)))

    tasks = [
        Task(i.name, lambda i=i: pair(i), 16 * math.prod(i.shape), float(math.prod(i.shape)))  # type: ignore[misc]
        for i in kept
    ]
    tasks += [
        Task(item.name, lambda i=item, n=name: whole(i, n))  # type: ignore[misc]
        for item, name, _ in _whole_specs(job)
    ]
    try:
        run_tasks("write", tasks, options.workers, options.memory_bytes, options.progress)
        writer.finish(indexed=False)
    finally:
        writer.close()
    return errors


def _candidate(job: Job, workspace: Workspace, ranks: Mapping[str, int]) -> Any:
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


def _plain(job: Job) -> Any:
    return lambda name: job.base.tensor(name)


def _record(job: Job, out: Path, to: str, made: Mapping[str, Any]) -> Record:
    factored: Mapping[str, Factored] = made["factored"]
    rows = [_row(item, factored.get(item.name), made) for item in job.items]
    lost = sum(row["lost_squared"] for row in rows)
    total = sum(row["delta_squared"] for row in rows)
    ranks = [row["rank"] for row in rows if row["rank"]]
    result: Record = {
        "record_version": RECORD_VERSION,
        "kind": "export",
        "archive": str(job.archive.folder),
        "base": job.base.label,
        "output": str(out),
        "to": to,
        "for": job.engine,
        "rest": job.rest,
        "method": job.archive.manifest.method,
        "settings": {
            "rank": job.choice.rank, "energy": job.choice.energy, "bytes": job.choice.n_bytes,
        },
        "archive_bytes": job.archive.n_bytes,
        "checkpoint_bytes": job.archive.manifest.finetuned.total_bytes,
        "adapter_bytes": made["adapter_bytes"],
        "largest_rank": max(ranks, default=0),
        "relative_error": math.sqrt(lost / total) if total else 0.0,
        "relative_error_of_pairs": _pair_error(rows),
        "notes": list(job.notes),
        "tensors": rows,
        "machine": machine(),
    }  # fmt: skip
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
