"""How well the delta is kept: relative error of each tensor, by block and role."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltafold.reporting.labels import End, label_beside
from deltafold.reporting.records import KnownRecord
from deltafold.reporting.records.compress import CompressRecord, TensorLine
from deltafold.reporting.style import Ink, canvas, role_look
from deltafold.reporting.tables import ABOUT_ERRORS, by_role, relative_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """A figure an archive that holds any tensor approximately."""
    for record in records:
        if isinstance(record, CompressRecord):
            tensors = [t for t in record.tensors if t.relative_error]  # neither None nor exact
            if tensors:
                yield f"error-by-block {record.title}", _figure(record, tensors, ink)


def _figure(record: CompressRecord, tensors: list[TensorLine], ink: Ink) -> Figure:
    """Faint marks are tensors, lines the error of all tensors of a role in a block as one."""
    figure = canvas(
        9.6,
        4.8,
        f"How much of the delta is lost, block by block: {record.title}",
        "Faint marks: single tensors. Lines: all tensors of a role in a block taken as one.\n"
        f"{ABOUT_ERRORS}",
    )
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.085, right=0.86, top=0.885, bottom=0.23)
    blocks = sorted({t.block for t in tensors if t.block is not None})
    outside = (blocks[-1] if blocks else 0) + max(1.5, 0.06 * len(blocks))
    every = 1 + (len(blocks) - 1) // 12
    ticks: dict[float, str] = {block: str(block) for block in blocks[::every]}
    ends: list[End] = []
    for role, lines in by_role(tensors):
        look, colour = role_look(role), role_look(role).colour(ink)
        inside = [t for t in lines if t.block is not None]
        axes.plot(
            [t.block if t.block is not None else outside for t in lines],
            [t.relative_error or 0.0 for t in lines],
            look.mark, color=colour, alpha=0.3, markersize=5, markeredgewidth=0,
        )  # fmt: skip
        means = [
            (block, error)
            for block in blocks
            if (error := relative_error(t for t in inside if t.block == block)) is not None
        ]
        if means:
            axes.plot(*zip(*means, strict=True), color=colour, marker=look.mark, markersize=5)
            ends.append(End(*means[-1], look.label, colour))
        for error in (t.relative_error or 0.0 for t in lines if t.block is None):
            axes.plot(outside, error, look.mark, color=colour, markersize=8)
            ends.append(End(outside, error, look.label, colour))
            ticks[outside] = "outside\nblocks"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(min([*blocks, outside]) - 0.6, max([*blocks, *ticks]) + 0.6)
    axes.set_ylim(0, 1.08 * max(1e-9, *(t.relative_error or 0.0 for t in tensors)))
    axes.set_xlabel("block")
    axes.set_ylabel("relative error of the delta")
    label_beside(axes, ends)
    return figure
