"""Markdown files: a report of its own, or a block of an existing page rewritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from deltafold.errors import StorageError, UsageError
from deltafold.foreign import blamed, shortage
from deltafold.reporting.table import Table


def page(tables: Sequence[Table], figures: Sequence[Path] = (), beside: Path | None = None) -> str:
    """The tables, then the figures, linked relative to the folder `beside`."""
    parts = [table.markdown() for table in tables]
    for figure in figures:
        link = Path(os.path.relpath(figure, beside or Path())).as_posix()
        parts.append(f"![{figure.stem.replace('-', ' ')}](<{link}>)\n")
    return "\n".join(parts)


def write_text(path: Path, text: str) -> None:
    """Write by rename, so that a reader never sees half a page. Raises StorageError."""
    working = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        working.write_text(text, encoding="utf-8", newline="\n")
        working.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            working.unlink(missing_ok=True)
        raise shortage(error, path) or StorageError(
            f"{path} cannot be written ({error.strerror}); choose another."
        ) from None


def rewrite_block(path: Path, marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker:begin -->` and `<!-- marker:end -->` in a file.

    Doing it twice gives the same file. Raises UsageError if the file or a marker is missing, or
    if a marker stands there twice.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    try:
        # newline="" keeps the line ends of the rest of the page as they are
        with path.open(encoding="utf-8", newline="") as file:
            page_text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise blamed(
            error, UsageError(f"{path} cannot be read as text ({error}); give a Markdown file.")
        ) from None
    for mark in (begin, end):
        if page_text.count(mark) != 1:
            raise UsageError(
                f"{path} has {page_text.count(mark)} lines {mark}; put {begin} and {end} there, "
                "once each, on lines of their own."
            )
    before, _, rest = page_text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UsageError(f"{path} has {end} before {begin}; swap them.")
    write_text(path, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
