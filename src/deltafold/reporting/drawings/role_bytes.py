"""Where the bytes are: each role in the checkpoint and in the archive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltafold.reporting.records import KnownRecord
from deltafold.reporting.records.compress import CompressRecord
from deltafold.reporting.style import Ink, canvas, role_look
from deltafold.reporting.tables import by_role, other_bytes
from deltafold.reporting.units import bytes_text, ratio_text, smaller_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """A figure an archive: on the left both at one scale, on the right the archive alone."""
    for record in records:
        if isinstance(record, CompressRecord) and record.tensors:
            yield f"bytes-by-role {record.title}", _figure(record, ink)


def _figure(record: CompressRecord, ink: Ink) -> Figure:
    roles = by_role(record.tensors)
    names = [role_look(role).label for role, _ in roles]
    colours = [role_look(role).colour(ink) for role, _ in roles]
    held = [sum(t.checkpoint_bytes for t in lines) for _, lines in roles]
    stored = [sum(t.bytes for t in lines) for _, lines in roles]
    shrunk = [
        f"{bytes_text(now)}  ({ratio_text(before / now)} smaller)" if now else bytes_text(now)
        for before, now in zip(held, stored, strict=True)
    ]
    for name, (before, now) in other_bytes(record).items():
        names.append(name.replace(" and ", "\nand "))
        colours.append(ink.muted)
        held.append(before)
        stored.append(now)
        shrunk.append(bytes_text(now))

    figure = canvas(12.4, 1.9 + 0.46 * len(names), f"Where the bytes are: {record.title}")
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.115, right=0.955, top=1 - 0.9 / height, bottom=0.55 / height, wspace=0.16
    )
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    totals = record.totals
    left.set_title(
        f"checkpoint, {bytes_text(totals.checkpoint_bytes)} (faint), and archive at its scale",
        fontsize=11,
    )
    right.set_title(
        f"archive alone, {bytes_text(totals.archive_bytes)}: {smaller_text(totals.file_ratio)}",
        fontsize=11,
    )
    _bars(left, held, colours, 0.3)
    _bars(left, stored, colours, 1.0)
    _bars(right, stored, colours, 1.0)
    _write(left, held, [bytes_text(size) if size else "" for size in held])
    _write(right, stored, shrunk)
    left.set_yticks(range(len(names)), names)
    right.set_yticks(range(len(names)), [""] * len(names))
    left.set_xlim(0, 1.2 * max(1, *held))
    right.set_xlim(0, 1.5 * max(1, *stored))
    return figure


def _bars(axes: Axes, sizes: list[int], colours: list[str], alpha: float) -> None:
    axes.barh(range(len(sizes)), sizes, color=colours, alpha=alpha, height=0.68)
    axes.set_ylim(len(sizes) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _write(axes: Axes, sizes: list[int], texts: list[str]) -> None:
    """A text at the end of each bar."""
    for row, (size, text) in enumerate(zip(sizes, texts, strict=True)):
        axes.annotate(
            text, (size, row), (5, 0), textcoords="offset points", va="center_baseline", fontsize=10
        )
