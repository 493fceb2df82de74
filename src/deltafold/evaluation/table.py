"""The record of an evaluation as one table, for the terminal (rich) and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltafold.running.record import Record


@dataclass(frozen=True)
class Column:
    """One metric: where it lies in `metrics`, its heading, how it is written, what it is."""

    path: tuple[str, ...]
    heading: str
    style: str
    meaning: str


_TEXT = (
    ("perplexity", "perplexity", "number", "exp of the mean loss per token; lower is better"),
    ("kl_text", "text KL", "number", "nats per token away from the fine-tune; 0 is equal"),
    ("agreement_text", "text agreement", "percent", "tokens with the fine-tune's first guess"),
)
_TASK = (
    ("exact_match", "exact match", "percent", "rows whose greedy answer is exactly right"),
    ("kl", "KL", "number", "nats per answer token away from the fine-tune; 0 is equal"),
    ("agreement", "agreement", "percent", "answer tokens with the fine-tune's first guess"),
    ("accuracy", "accuracy", "percent", "rows whose right choice is likeliest"),
    ("accuracy_normalised", "accuracy/token", "percent", "the same by the mean per token"),
)


def columns(record: Record) -> list[Column]:
    """The metrics that at least one model of the record has, in a fixed order."""
    found = [Column((key,), heading, style, what) for key, heading, style, what in _TEXT]
    metrics = [model["metrics"] for model in record["models"]]
    for task in _keys(each.get("tasks", {}) for each in metrics):
        found += [
            Column(("tasks", task, key), f"{task} {heading}", style, what)
            for key, heading, style, what in _TASK
        ]
    for task in _keys(each.get("lm_eval", {}) for each in metrics):
        for metric in _keys(each.get("lm_eval", {}).get(task, {}) for each in metrics):
            meaning = f"{metric} of lm-eval's task {task}"
            found.append(Column(("lm_eval", task, metric), f"{task} {metric}", "number", meaning))
    return [column for column in found if any(_figure(each, column.path) for each in metrics)]


def _keys(parts: Any) -> list[str]:
    return list(dict.fromkeys(key for part in parts for key in part))


def _figure(metrics: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    found: Any = metrics
    for key in path:
        found = found.get(key, {})
    return found or None


def format_figure(figure: dict[str, Any] | None, style: str) -> str:
    """`12.3 ± 0.21`, `93.5 ± 1.7 %`, or `-` where a model has no such figure."""
    if figure is None:
        return "-"
    value, stderr = figure["value"], figure["stderr"]
    if style == "percent":
        return f"{100 * value:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}") + " %"
    return f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


def grid(record: Record) -> list[list[str]]:
    """The table as rows of text, headings first.

    A model is a row, a metric a column; with more metrics than models it is the other way round,
    so that the table stays narrow.
    """
    models = record["models"]
    sized = any("file_ratio" in model for model in models)
    rows = [["", "role", *(["file ratio"] if sized else [])]]
    rows[0] += [column.heading for column in columns(record)]
    for model in models:
        ratio = f"{model['file_ratio']:.1f}x" if "file_ratio" in model else "-"
        row = [model["label"], model["role"], *([ratio] if sized else [])]
        row += [
            format_figure(_figure(model["metrics"], column.path), column.style)
            for column in columns(record)
        ]
        rows.append(row)
    if len(rows[0]) > len(rows):
        return [list(row) for row in zip(*rows, strict=True)]
    return rows


def explanations(record: Record) -> list[str]:
    """One short line a metric: what it is, and on how many tokens or rows."""
    lines = []
    if any("file_ratio" in model for model in record["models"]):
        lines.append("file ratio: bytes of the fine-tune / bytes of the archive")
    for column in columns(record):
        figures = [_figure(model["metrics"], column.path) for model in record["models"]]
        n = next(figure.get("n") for figure in figures if figure)
        count = f" (n = {n:,})" if n else ""
        lines.append(f"{column.heading}: {column.meaning}{count}")
    return lines


def rich_table(record: Record) -> Any:
    """The table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    head, *body = grid(record)
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    for index, heading in enumerate(head):
        table.add_column(Text(heading), justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a name are no markup
    return table
