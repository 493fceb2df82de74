"""Printing: human sizes, progress, tables. Quiet progress when not a terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


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


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; columns that start with `>` are right-aligned."""
    made = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return made


@contextlib.contextmanager
def progress(
    totals: dict[str, float] | None = None,
) -> Iterator[Callable[[str, str, float], None] | None]:
    """A progress bar a stage on stderr: tensor, share done, time left. None if not a terminal."""
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
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[tensor]}"),
        console=err,
        transient=True,
    )
    stages: dict[str, Any] = {}
    lock = threading.Lock()

    def advance(stage: str, tensor: str, work: float) -> None:
        with lock:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=(totals or {}).get(stage), tensor="")
            bar.update(stages[stage], advance=work, tensor=tensor)

    with bar:
        yield advance
