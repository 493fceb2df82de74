"""What `deltafold merge` prints of its record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from deltafold.cli.show import duration, out, say, size, table

Row = dict[str, Any]


def show(record: Row, where: Path | None) -> None:
    """The summary. `where` is None for a dry run: nothing was done yet."""
    recipe = record["recipe"]
    say(
        f"[bold]{record['output']}[/bold]  {len(record['models'])} models by {recipe['method']} "
        f"({recipe['sparsifier']}, {recipe['consensus']}), {size(record['output_bytes'])}"
    )
    for note in record["notes"]:
        say(f"  [yellow]{note}[/yellow]")
    if where is None:
        say(f"  {record['vocabulary']['rows']:,} vocabulary rows; dry run: nothing was written")
        return
    _show_models(record)
    if "search" in record:
        _show_search(record["search"])
    if "scores" in record:
        _show_scores(record["scores"])
    if "archive" in record:
        totals = record["archive"]
        say(
            f"  archive: {size(totals['archive_bytes'])}, {totals['file_ratio']:.2f}x smaller on disk"
        )
    say(
        f"  {duration(record['seconds'])}, peak memory {size(record['peak_memory_bytes'])}; "
        f"record in {where}"
    )


def brought(record: Row) -> list[Row]:
    """Of each model over all tensors: the norm of its delta, the share kept, how much is in the sum.

    `brought` weighs each tensor by the square of its delta's norm.
    """
    rows = [row for row in record["tensors"] if "norms" in row]
    found = []
    for n, label in enumerate(record["models"]):
        square = sum(row["norms"][n] ** 2 for row in rows)
        kept = sum(row["kept"][n] ** 2 for row in rows)
        along = sum(row["norms"][n] ** 2 * row["brought"][n] for row in rows if row["norms"][n])
        found.append(
            {
                "label": label,
                "norm": math.sqrt(square),
                "kept": math.sqrt(kept / square) if square else None,
                "brought": along / square if square else None,
            }
        )
    return found


def _show_models(record: Row) -> None:
    made = table("model", ">norm of delta", ">kept norm", ">in the merged")
    for row in brought(record):
        kept, inside = (
            "–" if row[key] is None else f"{row[key]:.0%}" for key in ("kept", "brought")
        )
        made.add_row(row["label"], f"{row['norm']:.4g}", kept, inside)
    out.print(made)
    rows = [row for row in record["tensors"] if "norms" in row]
    say(f"  merged delta: norm {math.sqrt(sum(row['norm'] ** 2 for row in rows)):.4g}")
    shared = sum(row["shared"] for row in rows)
    if shared:
        agreed = sum(row["agreed"] * row["shared"] for row in rows if row["shared"]) / shared
        say(f"  entries that several models change, agreed in sign: {agreed:.0%}")


def _show_search(search: Row) -> None:
    tried = search["tried"]
    names = list(tried[0]["settings"])
    made = table(*(f">{name}" for name in names), ">right", ">loss", "")
    for row in tried:
        if "failed" in row:
            figures = ["–", "–"]
        else:
            right = row["share_right"]
            figures = ["–" if right is None else f"{right:.1%}", f"{row['loss']:.4f}"]
        marks = "kept" if row.get("kept") else ""
        made.add_row(*(f"{row['settings'][name]:g}" for name in names), *figures, marks)
    say(f"  tried, by {search['criterion']}:")
    out.print(made)


def _show_scores(scores: list[Row]) -> None:
    """Models by tasks and texts."""
    metrics = scores[0]["metrics"]
    tasks = list(metrics.get("tasks", {}))
    text = ["perplexity"] * ("perplexity" in metrics)
    made = table("", *(f">{name}" for name in tasks), *(f">{name}" for name in text))
    for row in scores:
        cells = [_share(row["metrics"]["tasks"][name]) for name in tasks]
        cells += [f"{row['metrics'][name]['value']:.4g}" for name in text]
        bold = "bold" if row["role"] == "merged" else None
        made.add_row(row["label"], *cells, style=bold)
    out.print(made)


def _share(task: Row) -> str:
    figure = task.get("exact_match") or task["accuracy"]
    return f"{figure['value']:.1%}"
