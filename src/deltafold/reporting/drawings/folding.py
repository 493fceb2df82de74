"""A folded model: how alike its states were, and which blocks went into which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deltafold.reporting.records import KnownRecord
from deltafold.reporting.records.fold import FoldRecord
from deltafold.reporting.style import Ink, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """A heat map where states were compared, and a tree of what went, for each folded model."""
    for record in records:
        if isinstance(record, FoldRecord):
            if record.similarity is not None:
                yield f"similarity {record.title}", _heat_map(record, ink)
            if record.steps:
                yield f"folding {record.title}", _tree(record, ink)


def _heat_map(record: FoldRecord, ink: Ink) -> Figure:
    found = record.similarity
    assert found is not None
    figure = canvas(
        7.2,
        6.6,
        f"How alike states are, by {found.name}: {record.title}",
        "State 0 enters block 0, state n leaves block n - 1. Just above the diagonal lies what each\n"
        "block does: bright is little. Marks: blocks that went.",
    )
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.1, right=0.98, top=0.9, bottom=0.17)
    off = [v for i, row in enumerate(found.values) for j, v in enumerate(row) if i != j]
    image = axes.imshow(found.values, cmap="viridis", vmin=min(off), vmax=max(off), origin="upper")
    gone = record.removed.blocks
    axes.plot([b + 1 for b in gone], gone, "o", color="#ffffff", markeredgecolor="#000000")
    axes.grid(False)
    axes.set_xlabel("state")
    axes.set_ylabel("state")
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
    bar.ax.tick_params(colors=ink.muted)
    return figure


def _tree(record: FoldRecord, ink: Ink) -> Figure:
    """Blocks from left to right; a step is an arc from what went to what kept it, later ones higher."""
    figure = canvas(
        9.6,
        4.2,
        f"Which blocks went: {record.title}",
        "Filled: kept. Hollow: gone. An arc leads from a block to the one that takes its place; the\n"
        "higher, the later. A number is the kept block's share of the weighted sum.",
    )
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.03, right=0.98, top=0.88, bottom=0.26)
    kept = set(record.kept)
    for number in range(record.blocks):
        face = ink.text if number in kept else ink.ground
        axes.plot(number, 0, "o", color=face, markeredgecolor=ink.text, markersize=8)
    for order, step in enumerate(record.steps, start=1):
        for gone in step.gone:
            _arc(axes, order, gone, step.kept, step.ratio, ink)
    every = 1 + (record.blocks - 1) // 30
    axes.set_xticks(range(0, record.blocks, every))
    axes.set_xlim(-0.8, record.blocks - 0.2)
    axes.set_ylim(-0.5, len(record.steps) + 0.9)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("block")
    return figure


def _arc(axes: Any, order: int, gone: int, kept: int | None, ratio: float | None, ink: Ink) -> None:
    end = gone if kept is None else kept
    axes.plot([gone, gone, end, end], [0.2, order, order, 0.2], color=ink.muted, linewidth=1.2)
    if ratio is not None:
        axes.text(end, order + 0.08, f"{ratio:.2f}", ha="left", va="bottom", fontsize=8)
