"""Printing: human sizes, progress, tables. Quiet progress when not a terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from rich.progress import TaskID

    from deltafold.running.engine import Step

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line on stdout, with markup; the terminal wraps it, so that a piped line stays whole."""
    out.print(text, soft_wrap=True)


def say_sides(base: str | Path, finetuned: str | Path) -> None:
    """`base X (8.41 MB) -> fine-tune Y (8.4 MB)`, the first line of what is said of a pair."""
    from deltafold.compressing.order import sides

    one, other = (f"{label} ({size(n_bytes)})" for label, n_bytes in sides(base, finetuned))
    out.print(f"base {one} -> fine-tune {other}", soft_wrap=True, markup=False)


def size(n_bytes: float) -> str:
    """Bytes for people: 8,409,321 -> `8.41 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return (
                f"{n_bytes / factor:.3g} {unit}"
                if n_bytes < 999 * factor
                else f"{n_bytes / factor:.0f} {unit}"
            )
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


NAMED = 12
"""Names in one line of a summary; the record has all."""


def left_out_lines(record: Mapping[str, Any]) -> list[str]:
    """What a summary says of files that were not taken along, by reason."""
    by_reason: dict[str, list[str]] = {}
    for each in record.get("left_out", ()):
        by_reason.setdefault(each["why"], []).append(f"{each['name']} ({size(each['bytes'])})")
    return [
        f"  left out, {escape(why)}: {escape(', '.join(names[:NAMED]))}"
        + (f" and {len(names) - NAMED} more, see the record" if len(names) > NAMED else "")
        for why, names in by_reason.items()
    ]


def device_lines(record: Mapping[str, Any]) -> list[str]:
    """What a summary says of work on a GPU; nothing of work on the CPU."""
    found = record.get("device")
    if not found:
        return []
    again = f", {n} again in fp64" if (n := found.get("again_in_fp64")) else ""
    precision = {"float64": "fp64", "float32": "fp32"}[found["linear_algebra"]]
    lines = [
        f"  computed on {found['model']} ({found['name']}), linear algebra in {precision}{again}"
    ]
    if (text := found.get("text")) and text["dtype"] == "fp32":
        lines.append(
            f"  text run in fp32: predictions in bf16 are off by KL {text['kl_of_bf16']:.2g}, more "
            f"than {text['at_most']:g}"
        )
    elif text:
        lines.append(f"  text run in bf16, off by KL {text['kl_of_bf16']:.2g} from fp32")
    return lines


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; columns that start with `>` are right-aligned."""
    made = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return made


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Step], None] | None]:
    """A bar a stage on stderr: share done, time left, bytes so far, tensor. None off a terminal."""
    if not err.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[made]:>8}"),
        TextColumn(
            "[dim]{task.fields[tensor]}", table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
        console=err,
        transient=True,
    )
    stages: dict[str, TaskID] = {}
    lock = threading.Lock()

    def advance(step: Step) -> None:
        with lock:
            if step.stage not in stages:
                stages[step.stage] = bar.add_task(step.stage, total=step.total, tensor="", made="")
            made = size(step.made_bytes) if step.made_bytes else ""
            bar.update(stages[step.stage], completed=step.done, tensor=step.name, made=made)

    with bar:
        yield advance
