"""Tables of a frontier record: `frontier_tables(record, parts)`.

The parts: `gain`, what `auto` gains over the best published recipe; `kl` and `exact-match`, method
x size, one table a fine-tune; `cost`, seconds and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from deltafold.reporting.frontier import (
    COMMON_RATIO,
    Point,
    finetunes,
    grid,
    ordered,
)
from deltafold.reporting.frontier.gain import gain_tables
from deltafold.reporting.records import FrontierRecord, FrontierRow
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import (
    EXACT_KL,
    MISSING,
    bytes_text,
    kl_text,
    norm_text,
    percent_text,
    plain_text,
    ratio_text,
    ratio_words,
    seconds_text,
)
from deltafold.reporting.wording import described, machine_text

SMALLER = 1.1
"""From this factor between the size got and the size asked for, a cell says which it got."""


def frontier_tables(record: FrontierRecord, parts: Sequence[str] = ()) -> list[Table]:
    """The tables of the parts, all if none are named; model and machine stand under the last."""
    tables = [table for part in parts or PARTS for table in PARTS[part](record)]
    for table in tables[-1:]:
        table.notes.append(
            f"Model: {described('model', record.model)}. Machine: {machine_text(record.machine)}."
        )
    return tables


# --- method x size ------------------------------------------------------------------------------


def kl_tables(record: FrontierRecord) -> list[Table]:
    """KL from the fine-tune, lowest of a size bold."""
    return _figure_tables(record, "kl", "KL from the fine-tune", short_kl, min)


def short_kl(kl: float, deviation: float | None = None) -> str:
    """A KL for a narrow column."""
    return kl_text(kl) if kl <= EXACT_KL else plain_text(kl, deviation)


def exact_match_tables(record: FrontierRecord) -> list[Table]:
    """Exact match on held-out rows, highest of a size bold."""
    return _figure_tables(record, "exact_match", "exact match", percent_text, max)


def _figure_tables(
    record: FrontierRecord,
    name: str,
    title: str,
    show: Callable[..., str],
    choose: Callable[[Sequence[float]], float],
) -> list[Table]:
    """One table a fine-tune: rows are methods, columns the sizes asked for."""
    tables = []
    for finetune in finetunes(record):
        points = grid(record, finetune)
        ratios = sorted({asked for cells in points.values() for asked in cells})
        best: dict[float, float] = {}
        for asked in ratios:
            found = [cells[asked].value(name) for cells in points.values() if asked in cells]
            known = [value for value in found if value is not None]
            if len(set(known)) > 1:  # where all are alike none stands out
                best[asked] = choose(known)
        rows: list[list[Cell]] = []
        for method in ordered(points):
            cells = [points[method].get(asked) for asked in ratios]
            rows.append([method, *(_cell(point, name, show, best) for point in cells)])
        tables.append(
            Table(
                f"{record.title}, {finetune}: {title}",
                ["method", *map(ratio_words, ratios)],
                rows,
                notes=[_references(record, finetune, name, show)],
            )
        )
    for table in tables[-1:]:
        table.notes.append(_legend(record))
    return tables


def _cell(
    point: Point | None, name: str, show: Callable[..., str], best: dict[float, float]
) -> Cell:
    """Mean over the seeds ± their deviation; the ratio got, where it is far from the one asked."""
    figure = point.figure(name) if point else None
    if point is None or figure is None:
        return MISSING if point else ""
    text = show(figure.mean, figure.deviation)
    got = point.value("file_ratio")
    if got is not None and got > SMALLER * point.asked:
        text += f" ({ratio_text(got)})"
    return Strong(text) if figure.mean == best.get(point.asked) else text


def _references(record: FrontierRecord, finetune: str, name: str, show: Callable[..., str]) -> str:
    """What base and fine-tune have, and the data, in one line."""
    parts = []
    norm = record.relative_delta_norm.get(finetune)
    if norm is not None:
        parts.append(f"Norm of the delta: {norm_text(norm)} of the base's.")
    for role, scores in record.reference.get(finetune, {}).items():
        value = getattr(scores, name)
        if value is not None:
            parts.append(f"{role.capitalize()} alone: {show(value)}.")
    if data := record.data.get(finetune):
        parts.append(f"Data: {described('data', data)}.")
    return " ".join(parts)


def _legend(record: FrontierRecord) -> str:
    """How to read the cells of these tables."""
    seeds = len({row.seed for row in record.rows})
    text = (
        "Columns: bytes of the fine-tuned checkpoint / bytes of the archive that was asked for, "
        "everything counted; in brackets what was got, where the method has no use for so many "
        "bytes. Bold: best of a size. –: the method cannot meet this size; blank: not measured."
    )
    if seeds > 1:
        text += f" After ±: standard deviation over up to {seeds} seeds, where a method draws any."
    return text


# --- cost ---------------------------------------------------------------------------------------


def cost_tables(record: FrontierRecord) -> list[Table]:
    """Seconds and peak memory of the two commands at the common ratio, quickest method first."""
    timed: dict[str, list[FrontierRow]] = {}
    for row in record.rows:
        if row.asked_file_ratio == COMMON_RATIO and row.compress_seconds is not None:
            timed.setdefault(row.method, []).append(row)
    if not timed:
        return []
    lines = [
        (
            method,
            over(rows, "compress_seconds", mean),
            over(rows, "peak_memory_bytes", max),
            over(rows, "restore_seconds", mean),
            over(rows, "restore_peak_memory_bytes", max),
        )
        for method, rows in timed.items()
    ]
    lines.sort(key=lambda line: (line[1] or 0.0, line[0]))
    shown = [
        (method, seconds_text(a), bytes_text(b), seconds_text(c), bytes_text(d))
        for method, a, b, c, d in lines
    ]
    columns = ("method", "compress", "peak memory", "restore", "peak memory of restore")
    note = (
        "Each command in a process of its own, its start included. Seconds of compress: mean over "
        "the fine-tunes. Peaks: the largest. Restore: timed on one fine-tune."
    )
    if threads := record.machine.get("threads"):
        note += f" On {threads} core{'s' * (threads > 1)}."
    title = f"{record.title}: seconds and memory at {ratio_words(COMMON_RATIO)}"
    return [Table(title, columns, shown, [note])]


def over(
    rows: Sequence[FrontierRow], name: str, choose: Callable[[list[float]], float]
) -> float | None:
    """One number of a field over rows; None where no row has it."""
    found = [value for row in rows if (value := getattr(row, name)) is not None]
    return choose(found) if found else None


PARTS: dict[str, Callable[[FrontierRecord], list[Table]]] = {
    "gain": gain_tables,
    "kl": kl_tables,
    "exact-match": exact_match_tables,
    "cost": cost_tables,
}
