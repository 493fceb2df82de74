"""Tables of a record: `tables_of(record)`. A function a kind of record, a row each in `MAKERS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from deltafold.names import ROLES
from deltafold.reporting.records import KnownRecord, PlainRecord, understood
from deltafold.reporting.records.compress import CompressRecord, TensorLine
from deltafold.reporting.records.evaluate import EvaluatedModel, EvaluateRecord, Metric, Metrics
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.tables.benchmark import benchmark_tables
from deltafold.reporting.tables.factor import factor_tables
from deltafold.reporting.tables.fold import fold_tables
from deltafold.reporting.tables.frontier import frontier_tables
from deltafold.reporting.tables.merge import merge_tables
from deltafold.reporting.tables.share import share_tables
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    kl_text,
    number_text,
    percent_text,
    ratio_text,
    smaller_text,
)
from deltafold.reporting.wording import described, run_note
from deltafold.running.record import Record

ABOUT_ERRORS = (
    "0 is exact, 1 is leaving the delta out; methods that drop values at random and scale up the "
    "others may lie above."
)


def tables_of(record: Record | KnownRecord) -> list[Table]:
    """The tables of a record. Raises DeltafoldError if it is of no known kind or malformed."""
    known = understood(record)
    return MAKERS[known.kind](known)


# --- compress -----------------------------------------------------------------------------------


def compress_tables(record: CompressRecord) -> list[Table]:
    """Totals, scores, then bytes by role, then what was stored another way and why."""
    scores = _of_models(record.scores)
    return [_totals(record), *scores, _by_role(record), *_reasons(record)]


def _totals(record: CompressRecord) -> Table:
    totals, budget = record.totals, record.budget
    rows = [
        ("archive", f"{bytes_text(totals.archive_bytes)}, {smaller_text(totals.file_ratio)}"),
        ("fine-tuned checkpoint", bytes_text(totals.checkpoint_bytes)),
        ("method", record.method),
        ("base", record.base or MISSING),
        ("fine-tune", record.finetuned or MISSING),
    ]
    if budget.kind != "none":
        show = bytes_text if budget.kind == "bytes" else ratio_text
        rows.append(("budget", f"{budget.kind} {show(budget.asked)}, got {show(budget.got)}"))
    if totals.nominal_ratio is not None:
        rows.append(("nominal_ratio", f"{ratio_text(totals.nominal_ratio)} (linear layers only)"))
    return Table(record.title, ("", ""), rows, notes=[run_note(record)], left=2)


def _by_role(record: CompressRecord) -> Table:
    """One row a role, then what is in the archive besides tensors, then the total."""
    rows: list[Sequence[Cell]] = []
    for role, lines in by_role(record.tensors):
        held, stored = sum(t.checkpoint_bytes for t in lines), sum(t.bytes for t in lines)
        rows.append(
            (
                role,
                ", ".join(sorted({t.codec for t in lines})),
                str(len(lines)),
                bytes_text(held),
                bytes_text(stored),
                ratio_text(held / stored) if stored else MISSING,
                number_text(relative_error(lines)),
            )
        )
    for name, (held, stored) in other_bytes(record).items():
        rows.append((name, "", "", bytes_text(held) if held else "", bytes_text(stored), "", ""))
    totals = record.totals
    numbers = bytes_text(totals.checkpoint_bytes), bytes_text(totals.archive_bytes)
    count, ratio = str(len(record.tensors)), ratio_text(totals.file_ratio)
    rows.append([Strong(text) for text in ("total", "", count, *numbers, ratio, "")])
    columns = ("role", "codecs", "tensors", "checkpoint", "archive", "smaller", "relative error")
    note = (
        "Relative error: norm of what the archive gets wrong in the delta / norm of the delta. "
        f"{ABOUT_ERRORS}"
    )
    return Table("Bytes by role", columns, rows, notes=[note], left=2)


def _reasons(record: CompressRecord) -> list[Table]:
    groups: dict[tuple[str, str], list[TensorLine]] = {}
    for tensor in record.tensors:
        if tensor.why:
            groups.setdefault((tensor.why, tensor.codec), []).append(tensor)
    if not groups:
        return []
    rows = [
        (why, codec, str(len(lines)), bytes_text(sum(t.bytes for t in lines)))
        for (why, codec), lines in sorted(groups.items())
    ]
    columns = ("why", "codec", "tensors", "archive")
    return [Table("Tensors stored another way", columns, rows, left=2)]


def by_role(tensors: Iterable[TensorLine]) -> list[tuple[str, list[TensorLine]]]:
    """Tensors grouped by role, in the order of `names.ROLES`, without empty groups."""
    groups: dict[str, list[TensorLine]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.role, []).append(tensor)
    order = [*ROLES, *sorted(set(groups) - set(ROLES))]
    return [(role, groups[role]) for role in order if role in groups]


def other_bytes(record: CompressRecord) -> dict[str, tuple[int, int]]:
    """Bytes (in the checkpoint, in the archive) of no tensor, so that parts add up to the whole."""
    totals = record.totals
    held = totals.checkpoint_bytes - sum(t.checkpoint_bytes for t in record.tensors)
    rest = totals.archive_bytes - sum(t.bytes for t in record.tensors) - totals.files_bytes
    parts = {
        "manifest and headers": (0, max(0, rest)),
        "tokenizer and configuration": (max(0, held), totals.files_bytes),
    }
    return {name: sizes for name, sizes in parts.items() if any(sizes)}


def relative_error(tensors: Iterable[TensorLine]) -> float | None:
    """Error of several tensors taken as one: sqrt(sum (e_t d_t)^2 / sum d_t^2), d_t delta norms.

    Tensors without a figure do not count; None if there is none with one.
    """
    known = [t for t in tensors if t.relative_error is not None and t.delta_norm]
    if not known:
        return None
    wrong = math.fsum(((t.relative_error or 0.0) * (t.delta_norm or 0.0)) ** 2 for t in known)
    return math.sqrt(wrong / math.fsum((t.delta_norm or 0.0) ** 2 for t in known))


# --- evaluate -----------------------------------------------------------------------------------

_SHOWN: dict[str, tuple[str, Callable[[float | None, float | None], str]]] = {
    "perplexity": ("perplexity", number_text),
    "kl_text": ("KL from the fine-tune", kl_text),
    "agreement_text": ("agreement", percent_text),
    "exact_match": ("exact match", percent_text),
    "accuracy": ("accuracy", percent_text),
    "accuracy_normalised": ("accuracy by the mean per token", percent_text),
    "kl": ("KL from the fine-tune", kl_text),
    "agreement": ("agreement", percent_text),
}


def evaluate_tables(record: EvaluateRecord) -> list[Table]:
    """One table of what was measured on text, then one a task; a column needs one value."""
    shown = _of_models(record.models)
    if shown:
        shown[-1].notes.append(run_note(record))
    return shown


def _of_models(evaluated: Sequence[EvaluatedModel]) -> list[Table]:
    models = [model.metrics for model in evaluated]
    tables = [_evaluated("On text", evaluated, [_text_metrics(metrics) for metrics in models])]
    for words, groups in (
        ("Task", [metrics.tasks for metrics in models]),
        ("Task of lm-eval:", [metrics.lm_eval for metrics in models]),
    ):
        for name in dict.fromkeys(name for group in groups for name in group):
            found = [group.get(name, {}) for group in groups]
            tables.append(_evaluated(f"{words} {name}", evaluated, found))
    shown = [table for table in tables if table is not None]
    if shown:
        shown[-1].notes.append(
            "After ±: one standard error. KL and agreement compare with the fine-tune."
        )
    return shown


def _text_metrics(metrics: Metrics) -> dict[str, Metric]:
    found = {
        "perplexity": metrics.perplexity,
        "kl_text": metrics.kl_text,
        "agreement_text": metrics.agreement_text,
    }
    return {name: metric for name, metric in found.items() if metric is not None}


def _evaluated(
    title: str, evaluated: Sequence[EvaluatedModel], found: list[dict[str, Metric]]
) -> Table | None:
    """Rows are models, columns those metrics that any of them has in `found`; None without any."""
    others = sorted({name for metrics in found for name in metrics} - set(_SHOWN))
    names = [name for name in (*_SHOWN, *others) if any(name in metrics for metrics in found)]
    if not names:
        return None
    rows = []
    for model, metrics in zip(evaluated, found, strict=True):
        cells = [model.label, model.role, bytes_text(model.archive_bytes)]
        cells.append(ratio_text(model.file_ratio))
        for name in names:
            metric = metrics.get(name, Metric())
            cells.append(_shown(name)[1](metric.value, metric.stderr))
        rows.append(cells)
    columns = ["model", "role", "archive", "smaller", *(_shown(name)[0] for name in names)]
    counts = {m[name].n or 0 for m in found for name in names if name in m} - {0}
    sizes = " or ".join(f"{count:,}" for count in sorted(counts))
    return Table(title, columns, rows, [f"Samples: {sizes}."] if sizes else [], left=2)


def _shown(name: str) -> tuple[str, Callable[[float | None, float | None], str]]:
    return _SHOWN.get(name, (name, number_text))


# --- restore, verify, plan ----------------------------------------------------------------------


def plain_tables(record: PlainRecord) -> list[Table]:
    """Keys and values; a group of values is shown one level deep, a list by its length."""
    rows: list[tuple[str, str]] = []
    extra: dict[str, Any] = {"settings": record.settings} | (record.model_extra or {})
    for key, value in extra.items():
        if key == "record_version":
            continue
        if isinstance(value, dict):
            rows += [(f"{key}: {inner}", described(inner, v)) for inner, v in value.items()]
        else:
            rows.append((key, described(key, value)))
    return [Table(record.kind, ("", ""), rows, notes=[run_note(record)], left=2)]


MAKERS: dict[str, Callable[[Any], list[Table]]] = {
    "compress": compress_tables,
    "evaluate": evaluate_tables,
    "benchmark": benchmark_tables,
    "frontier": frontier_tables,
    "merge": merge_tables,
    "fold": fold_tables,
    "factor": factor_tables,
    "share": share_tables,
    "restore": plain_tables,
    "verify": plain_tables,
    "plan": plain_tables,
}
