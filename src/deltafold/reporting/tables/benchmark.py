"""Tables of a benchmark: one a fine-tune, rows method x ratio, the lowest KL of a ratio in bold."""

from __future__ import annotations

from collections.abc import Callable

from deltafold.reporting.records import BenchmarkRecord, BenchmarkRow, Scores
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import (
    bytes_text,
    kl_text,
    number_text,
    percent_text,
    ratio_text,
    seconds_text,
)
from deltafold.reporting.wording import described, machine_text

# (field of a row, title of the column, how it is shown), in the order shown
COLUMNS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("asked_file_ratio", "asked", ratio_text),
    ("file_ratio", "smaller", ratio_text),
    ("nominal_ratio", "nominal_ratio", ratio_text),
    ("archive_bytes", "archive", bytes_text),
    ("kl", "KL from the fine-tune", kl_text),
    ("agreement", "agreement", percent_text),
    ("exact_match", "exact match", percent_text),
    ("accuracy", "accuracy", percent_text),
    ("perplexity", "perplexity", number_text),
    ("compress_seconds", "compress", seconds_text),
    ("restore_seconds", "restore", seconds_text),
    ("peak_memory_bytes", "peak memory", bytes_text),
)
_REFERENCE_FIRST = {"base": 0, "fine-tune": 1}


def benchmark_tables(record: BenchmarkRecord) -> list[Table]:
    """One table a fine-tune; what model, data and machine it speaks of stands under the last."""
    finetunes = dict.fromkeys(row.finetune for row in record.rows)
    tables = [_finetune_table(record, finetune) for finetune in finetunes]
    for table in tables[-1:]:
        table.notes += [
            "Bold: lowest KL among methods asked for the same size. Smaller: bytes of the "
            "fine-tuned checkpoint / bytes of the archive, everything counted. After ±: one "
            "standard error.",
            f"Model: {described('model', record.model)}. Data: {described('data', record.data)}. "
            f"Machine: {machine_text(record.machine)}.",
        ]
    return tables


def best_rows(rows: list[BenchmarkRow]) -> set[int]:
    """Numbers of the rows with the lowest KL among several rows that were asked the same ratio."""
    best: set[int] = set()
    for asked in {row.asked_file_ratio for row in rows} - {None}:
        rivals = [
            (row.kl, number)
            for number, row in enumerate(rows)
            if row.asked_file_ratio == asked and row.kl is not None
        ]
        if len(rivals) > 1:
            lowest = min(kl for kl, _ in rivals)
            best |= {number for kl, number in rivals if kl == lowest}
    return best


def _finetune_table(record: BenchmarkRecord, finetune: str) -> Table:
    """The reference models first, then the methods by the size asked for."""
    rows = [row for row in record.rows if row.finetune == finetune]
    rows.sort(key=lambda row: (row.asked_file_ratio or 0.0, row.method))
    references = sorted(
        record.reference.get(finetune, {}).items(),
        key=lambda item: (_REFERENCE_FIRST.get(item[0], 2), item[0]),
    )
    known: list[Scores] = [*rows, *(scores for _, scores in references)]
    columns = [c for c in COLUMNS if any(getattr(s, c[0], None) is not None for s in known)]

    lines: list[list[Cell]] = [
        [name, *(_cell(scores, field, show) for field, _, show in columns)]
        for name, scores in references
    ]
    best = best_rows(rows)
    for number, row in enumerate(rows):
        line: list[Cell] = [row.method]
        for field, _, show in columns:
            text = _cell(row, field, show)
            line.append(Strong(text) if field == "kl" and number in best else text)
        lines.append(line)
    title = f"{record.title}: {finetune}" if record.title else finetune
    return Table(title, ["method", *(title for _, title, _ in columns)], lines, keys=2)


def _cell(scores: Scores, field: str, show: Callable[..., str]) -> str:
    """The value with its standard error; blank where a reference model has no such thing."""
    if not hasattr(scores, field):
        return ""
    stderr = getattr(scores, f"{field}_stderr", None)
    value = getattr(scores, field)
    return show(value, stderr) if stderr else show(value)
