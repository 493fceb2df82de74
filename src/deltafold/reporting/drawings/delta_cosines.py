"""How alike the deltas of merged models are: cosine and agreement of signs, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from deltafold.reporting.labels import End, label_beside
from deltafold.reporting.records import KnownRecord
from deltafold.reporting.records.merge import MergeRecord
from deltafold.reporting.style import Ink, canvas, method_looks
from deltafold.reporting.tables.merge import agreed, cosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """A figure a merge of at least two models with blocks."""
    for record in records:
        if isinstance(record, MergeRecord) and len(record.models) > 1:
            blocks = sorted({t.block for t in record.floats if t.block is not None})
            if blocks:
                yield f"delta-cosines {record.title}", _figure(record, blocks, ink)


def _figure(record: MergeRecord, blocks: list[int], ink: Ink) -> Figure:
    figure = canvas(
        9.6,
        6.4,
        f"How alike the merged deltas are, block by block: {record.title}",
        "Cosine: 0 where two fine-tunes changed the weights in unrelated ways, 1 where in the same.\n"
        "Agreed: of the entries that several models change, those whose changes have one sign. "
        "Dashed: by chance, if all models change all.",
    )
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.085, right=0.78, top=0.9, bottom=0.16, hspace=0.16)
    inside = {block: [t for t in record.floats if t.block == block] for block in blocks}
    pairs = list(combinations(range(len(record.models)), 2))
    names = [f"{record.short[a]} · {record.short[b]}" for a, b in pairs]
    looks = method_looks(names)
    ends = []
    for number, (pair, name) in enumerate(zip(pairs, names, strict=True)):
        points = [
            (block, value)
            for block in blocks
            if (value := cosine(inside[block], number, pair)) is not None
        ]
        if points:
            look = looks[name]
            upper.plot(
                *zip(*points, strict=True), color=look.colour(ink), marker=look.mark, markersize=5
            )
            ends.append(End(*points[-1], name, look.colour(ink)))
    upper.axhline(0, color=ink.muted, linewidth=1)
    upper.set_ylabel("cosine of deltas")
    _room(upper, -0.05, 0.05)  # zero is in sight, and a flat line looks flat
    shares = [(block, share) for block in blocks if (share := agreed(inside[block])) is not None]
    if shares:
        lower.plot(*zip(*shares, strict=True), color=ink.text, marker="o", markersize=5)
    chance = 2.0 ** (1 - len(record.models))
    lower.axhline(chance, color=ink.muted, linewidth=1, linestyle="--")
    _room(lower, chance - 0.05, chance + 0.05)
    lower.set_ylabel("agreed in sign")
    lower.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    lower.set_xlabel("block")
    every = 1 + (len(blocks) - 1) // 12
    lower.set_xticks(blocks[::every], [str(block) for block in blocks[::every]])
    label_beside(upper, ends)
    return figure


def _room(axes: Axes, low: float, high: float) -> None:
    """At least this much of the axis is shown."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, low), max(top, high))
