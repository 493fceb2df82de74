"""All methods of a frontier record: KL against bytes of the archive, one panel a fine-tune."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from deltafold.reporting.frontier import SUBJECT, Grid, Point, finetunes, grid, ordered
from deltafold.reporting.records import FrontierRecord, KnownRecord
from deltafold.reporting.style import Ink, Look, canvas, method_looks, plain_ticks
from deltafold.reporting.units import EXACT_KL, bytes_text, norm_text, ratio_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # panels in a row
PANEL_INCHES = (3.5, 4.7)
LEGEND_INCHES = 1.5
WORSE_THAN_BASE = 2.5  # times the base's KL: what is above is not shown
Dots = list[tuple[float, float, float, float]]  # bytes, mean, lowest and highest KL


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """One figure a record, if it holds a KL that is not zero."""
    for record in records:
        if not isinstance(record, FrontierRecord):
            continue
        grids = {name: grid(record, name) for name in finetunes(record)}
        shown = {name: points for name, points in grids.items() if any(dots_of(points).values())}
        if shown:
            yield f"frontier {record.title}", _figure(record, shown, ink)


def dots_of(points: Grid) -> dict[str, Dots]:
    """What is drawn of each method: sizes with a KL above zero, smallest archive first."""
    found: dict[str, Dots] = {}
    for method, cells in points.items():
        dots: Dots = []
        for point in cells.values():
            kl, n_bytes = point.figure("kl"), point.value("archive_bytes")
            if kl is not None and n_bytes and min(kl.values) > EXACT_KL:
                dots.append((n_bytes, kl.mean, min(kl.values), max(kl.values)))
        found[method] = sorted(dots)
    return found


def _figure(record: FrontierRecord, grids: dict[str, Grid], ink: Ink) -> Figure:
    columns = min(COLUMNS, len(grids))
    lines = math.ceil(len(grids) / columns)
    width = PANEL_INCHES[0] * columns + LEGEND_INCHES
    height = PANEL_INCHES[1] * lines + 0.9
    seeds = {row.seed for row in record.rows}
    bars = "Bars: lowest and highest of the seeds. " if len(seeds) > 1 else ""
    note = f"Down and to the left is better. {bars}Size: every byte of the archive."
    title = f"How near to the fine-tune at which size: {record.title}"
    figure = canvas(width, height, title, note)
    figure.subplots_adjust(
        left=0.75 / width,
        right=1 - LEGEND_INCHES / width,
        top=1 - 0.95 / height,
        bottom=1.05 / height,
        wspace=0.3,
        hspace=0.5,
    )
    looks = method_looks(method for points in grids.values() for method in points)
    for number, (finetune, points) in enumerate(grids.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        base = record.reference.get(finetune, {}).get("base")
        _panel(axes, points, base.kl if base else None, looks, ink)
        norm = record.relative_delta_norm.get(finetune)
        below = "" if norm is None else f"\ndelta: {norm_text(norm)} of the base's norm"
        axes.set_title(f"{finetune}{below}", fontsize=11)
        if number % columns == 0:
            axes.set_ylabel("KL divergence from the fine-tune")
    _legend(figure, next(iter(grids.values())), looks, ink)
    return figure


def _panel(
    axes: Axes, points: Grid, base_kl: float | None, looks: dict[str, Look], ink: Ink
) -> None:
    """One line a method; `auto` thicker, and above the others. Lines leave far above the base."""
    drawn = {method: dots for method, dots in dots_of(points).items() if dots}
    for method, dots in drawn.items():
        main = method == SUBJECT
        colour = looks[method].colour(ink)
        axes.errorbar(
            [x for x, *_ in dots],
            [y for _, y, *_ in dots],
            yerr=[[y - low for _, y, low, _ in dots], [high - y for _, y, _, high in dots]],
            color=colour,
            marker=looks[method].mark,
            markersize=7.5 if main else 5,
            linewidth=3.4 if main else 1.5,
            ecolor=colour,
            elinewidth=1.2,
            capsize=2.5,
            zorder=5 if main else 3,
        )
    sizes = [x for dots in drawn.values() for x, *_ in dots]
    ends = [kl for dots in drawn.values() for _, _, *ends in dots for kl in ends]
    low, high = min(ends) / 1.5, max(ends) * 1.5
    if base_kl:
        high = max(2 * low, min(high, WORSE_THAN_BASE * base_kl))
        axes.axhline(base_kl, color=ink.muted, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.annotate(
            "base alone", (1, base_kl), (-2, 3), ("axes fraction", "data"), "offset points",
            ha="right", fontsize=8.5, color=ink.muted, annotation_clip=True,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(*plain_ticks(low, high))
    axes.set_yticks([], minor=True)
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
    ticks = size_ticks([point for cells in points.values() for point in cells.values()])
    axes.set_xticks([size for size, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("size of the archive", labelpad=6)


def size_ticks(points: Sequence[Point]) -> list[tuple[float, str]]:
    """(bytes, text) for each ratio asked for: the size that it means, and the ratio below."""
    checkpoint = [row.file_ratio * row.archive_bytes for point in points for row in point.rows
                  if row.file_ratio and row.archive_bytes]  # fmt: skip
    asked = sorted({point.asked for point in points if point.rows})
    if not checkpoint:
        return []
    sizes = [median(checkpoint) / ratio for ratio in asked]
    return [
        (size, f"{bytes_text(float(f'{size:.2g}'))}\n{ratio_words(ratio)}")
        for size, ratio in zip(sizes, asked, strict=True)
    ]


def _legend(figure: Figure, points: Grid, looks: dict[str, Look], ink: Ink) -> None:
    """Names beside the last panel, in the order of the tables."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=looks[method].colour(ink),
            marker=looks[method].mark,
            linewidth=3.4 if method == SUBJECT else 1.5,
            label=looks[method].label,
        )
        for method in [*ordered(points), *sorted(set(looks) - set(points))]
    ]
    width = figure.get_figwidth()
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1 - (LEGEND_INCHES - 0.08) / width, 0.53),
        fontsize=10,
        labelspacing=0.75,
    )
