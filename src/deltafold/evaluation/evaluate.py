"""What compression did to a model: base, fine-tune and candidates under one setting, one record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltafold.archive import read_manifest
from deltafold.calibration.models import quiet
from deltafold.checkpoint import archive_folder
from deltafold.errors import UsageError
from deltafold.evaluation.loading import (
    choose_device,
    choose_dtype,
    dtype_name,
    end_token_ids,
    is_archive,
    load_tokenizer,
    loaded,
    model_folder,
)
from deltafold.evaluation.plan import Plan
from deltafold.evaluation.request import EvaluateRequest
from deltafold.running.front import front
from deltafold.running.memory import Meter
from deltafold.running.record import (
    RECORD_VERSION,
    Record,
    machine,
    read_record,
    record_path,
    write_record,
)

Source = str | Path


def run_evaluate(request: EvaluateRequest) -> Record:
    """Measure all models, and write the record where it was asked for. Raises DeltafoldError."""
    finetuned, models, base = request.finetuned, request.models, request.base
    wanted = choose_dtype(request.dtype)
    _check_sources(finetuned, models, base)
    device = choose_device(request.device)
    with Meter() as meter, quiet():
        tokenizer = load_tokenizer(finetuned)
        plan = Plan(request, tokenizer, end_token_ids(finetuned, tokenizer))
        entries, used = _measure_all(plan, request, wanted, device)
    settings = plan.settings() | {
        "finetuned": str(finetuned),
        "base": None if base is None else str(base),
        "dtype": dtype_name(used),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "evaluate",
        "machine": machine(),
        "settings": settings,
        "models": entries,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
    }
    if request.record is not None:
        write_record(record, Path(request.record))
    return record


evaluate = front("evaluate", EvaluateRequest, run_evaluate)


def _check_sources(finetuned: Source, models: Sequence[Source], base: Source | None) -> None:
    """What can be known without reading weights is said before an hour is spent on measuring."""
    for role, source in (("fine-tune", finetuned), ("base", base)):
        if source is not None and is_archive(source):
            raise UsageError(
                f"{source} is an archive, but the {role} must be an ordinary model folder; "
                "restore it first, or give the folder that it was made from."
            )
    archives = [source for source in models if is_archive(source)]
    if archives and base is None:
        raise UsageError(f"{archives[0]} is an archive; give its base with --base.")
    for source in (finetuned, base, *models):
        if source is not None and source not in archives:
            model_folder(source)


def _measure_all(
    plan: Plan, request: EvaluateRequest, dtype: torch.dtype | None, device: str
) -> tuple[list[Record], torch.dtype]:
    """The entries of the record in the order base, fine-tune, candidates, and the dtype used."""
    finetuned, models, base = request.finetuned, request.models, request.base
    report = request.report or (lambda line: None)
    others: list[tuple[str, Source]] = [("base", base)] if base is not None else []
    others += [("candidate", source) for source in models]
    label, *labels = _labels([finetuned, *(source for _, source in others)])
    report(f"{label}: loading")
    start = time.perf_counter()
    with loaded(label, finetuned, base, dtype, device) as teacher:
        used = dtype or teacher.model.dtype
        plan.cut_texts(teacher)
        metrics = plan.measure(teacher, None, report)
        entries = [_entry(label, "fine-tune", finetuned, metrics, time.perf_counter() - start)]
        for label, (role, source) in zip(labels, others, strict=True):
            report(f"{label}: loading")
            start = time.perf_counter()
            with loaded(label, source, base, used, device) as subject:
                metrics = plan.measure(subject, teacher, report)
            entries.append(_entry(label, role, source, metrics, time.perf_counter() - start))
    order = ("base", "fine-tune", "candidate")
    return sorted(entries, key=lambda entry: order.index(entry["role"])), used


def _labels(sources: Sequence[Source]) -> list[str]:
    """Short names, all different: the folder's name, else the whole path, else numbered."""
    names = [Path(source).name or str(source) for source in sources]
    labels: list[str] = []
    for name, source in zip(names, sources, strict=True):
        label = name if names.count(name) == 1 else str(source)
        twins = sum(each == label or each.startswith(f"{label} (") for each in labels)
        labels.append(f"{label} ({twins + 1})" if twins else label)
    return labels


def _entry(
    label: str, role: str, source: Source, metrics: dict[str, Any], seconds: float
) -> Record:
    sizes = _sizes(Path(source).expanduser()) if role == "candidate" else {}
    return {
        "label": label,
        "role": role,
        "path": str(source),
        "seconds": seconds,
        **sizes,
        "metrics": metrics,
    }


def _sizes(path: Path) -> dict[str, Any]:
    """`archive_bytes`, `file_ratio`, `method` of an archive, or of what was restored from one."""
    if is_archive(path):
        folder = archive_folder(path)
        manifest = read_manifest(folder)
        archive_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {
            "archive_bytes": archive_bytes,
            "file_ratio": manifest.finetuned.total_bytes / archive_bytes,
            "method": manifest.method,
        }
    if not record_path(path).is_file():
        return {}
    record = read_record(record_path(path))
    if record.get("kind") != "restore":
        return {}
    return {key: record[key] for key in ("archive_bytes", "file_ratio", "method") if key in record}
