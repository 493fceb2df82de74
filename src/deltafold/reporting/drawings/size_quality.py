"""How much is kept at which size: KL and accuracy against file_ratio, one line a method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from deltafold.reporting.labels import End, Line, label_lines
from deltafold.reporting.records import BenchmarkRecord, KnownRecord, Scores
from deltafold.reporting.records.evaluate import EvaluateRecord, Metric
from deltafold.reporting.style import Ink, Look, canvas, method_looks, plain_ticks
from deltafold.reporting.units import EXACT_KL, bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (field of the scores, axis label): the first that any method has is drawn on the right
_QUALITIES = (
    ("exact_match", "exact match on held-out rows"),
    ("accuracy", "accuracy"),
    ("agreement", "same next token as the fine-tune"),
)
LEAST_POINTS = 2  # of a single archive a table says more
_REFERENCE_DASHES = {"fine-tune": (0, (5, 2)), "base": (0, (1, 2))}


@dataclass
class Group:
    """What is drawn in one figure: a fine-tune on one kind of data."""

    title: str
    points: dict[str, list[tuple[float, Scores]]] = field(default_factory=dict)  # by method
    references: dict[str, Scores] = field(default_factory=dict)
    checkpoint_bytes: list[float] = field(default_factory=list)

    def add(self, method: str, ratio: float, archive_bytes: float | None, scores: Scores) -> None:
        self.points.setdefault(method, []).append((ratio, scores))
        if archive_bytes is not None:
            self.checkpoint_bytes.append(ratio * archive_bytes)

    def ratios(self) -> list[float]:
        return [ratio for points in self.points.values() for ratio, _ in points]


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """A figure a fine-tune of a benchmark, and one a task of evaluations of several archives."""
    groups = [group for group in groups_of(records) if len(group.ratios()) >= LEAST_POINTS]
    looks = method_looks(method for group in groups for method in group.points)
    for group in groups:
        has_kl = any(value > EXACT_KL for value in _values(group, "kl"))
        quality = next((pair for pair in _QUALITIES if _values(group, pair[0])), None)
        if has_kl or quality:
            yield f"size-and-quality {group.title}", _figure(group, has_kl, quality, looks, ink)


def groups_of(records: Sequence[KnownRecord]) -> list[Group]:
    """Points of all records, those that speak of one fine-tune and one kind of data together."""
    groups: dict[str, Group] = {}
    for record in records:
        if isinstance(record, BenchmarkRecord):
            for row in record.rows:
                group = groups.setdefault(row.finetune, Group(row.finetune))
                group.references |= record.reference.get(row.finetune, {})
                if row.file_ratio:
                    group.add(row.method, row.file_ratio, row.archive_bytes, row)
        elif isinstance(record, EvaluateRecord):
            _add_evaluation(record, groups)
    return list(groups.values())


def _add_evaluation(record: EvaluateRecord, groups: dict[str, Group]) -> None:
    for model in record.models:
        metrics = model.metrics
        text = {"kl": metrics.kl_text, "agreement": metrics.agreement_text}
        known_text = {name: metric for name, metric in text.items() if metric is not None}
        for stem, found in [("text", known_text), *metrics.tasks.items()]:
            if not found:
                continue
            group = groups.setdefault(stem, Group(stem))
            if model.role != "candidate":
                group.references[model.role] = _scores(found)
            elif model.file_ratio:
                method = model.method or model.label
                group.add(method, model.file_ratio, model.archive_bytes, _scores(found))


def _scores(metrics: dict[str, Metric]) -> Scores:
    values = {name: metric.value for name, metric in metrics.items()}
    errors = {f"{name}_stderr": metric.stderr for name, metric in metrics.items()}
    return Scores.model_validate(values | errors)


# --- drawing ------------------------------------------------------------------------------------


def _figure(
    group: Group,
    has_kl: bool,
    quality: tuple[str, str] | None,
    looks: dict[str, Look],
    ink: Ink,
) -> Figure:
    panels = has_kl + (quality is not None)
    note = "Bars: one standard error. Size counts every byte of the archive."
    figure = canvas(6.2 * panels, 5.0, f"What is kept at which size: {group.title}", note)
    figure.subplots_adjust(
        left=0.17 / panels, right=1 - 0.26 / panels, top=0.81, bottom=0.21, wspace=0.52
    )
    if has_kl:
        _kl_panel(figure.add_subplot(1, panels, 1), group, looks, ink)
    if quality is not None:
        _share_panel(figure.add_subplot(1, panels, panels), group, *quality, looks, ink)
    return figure


def _values(group: Group, name: str, with_errors: bool = False) -> list[float]:
    """All values of a metric among the methods, or the ends of their error bars."""
    found = []
    for scores in (scores for points in group.points.values() for _, scores in points):
        value, stderr = getattr(scores, name), getattr(scores, f"{name}_stderr") or 0.0
        if value is not None:
            found += [value - stderr, value + stderr] if with_errors else [value]
    return found


def _kl_panel(axes: Axes, group: Group, looks: dict[str, Look], ink: Ink) -> None:
    """KL on a log axis. Outputs equal to the fine-tune's lie on a line of their own at the foot."""
    values = _values(group, "kl")
    lossy = [value for value in values if value > EXACT_KL]
    has_exact = min(values) <= EXACT_KL
    floor = min(lossy) / 4
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.6 if has_exact else min(lossy) / 1.6, max(lossy) * 1.6)
    _size_axis(axes, group)
    axes.set_yticks(*plain_ticks(min(lossy) / 1.6, max(lossy) * 1.6))
    axes.set_yticks([], minor=True)
    if has_exact:
        axes.axhline(floor, color=ink.muted, linewidth=1.0, linestyle=(0, (1, 2)))
        axes.annotate(
            "exact", (0, floor), (-4, 0), ("axes fraction", "data"), "offset points",
            ha="right", va="center", fontsize=9,
        )  # fmt: skip
    axes.set_title("KL divergence from the fine-tune\nlower is better", fontsize=11)
    ends, lines = _lines(axes, group, "kl", looks, ink, floor)
    label_lines(axes, ends, lines, ink)


def _share_panel(
    axes: Axes, group: Group, name: str, title: str, looks: dict[str, Look], ink: Ink
) -> None:
    """Accuracy in percent, with the base and the fine-tune as horizontal lines."""
    references = {
        role: value
        for role, scores in group.references.items()
        if (value := getattr(scores, name)) is not None
    }
    shown = [*_values(group, name, with_errors=True), *references.values()]
    margin = max(0.01, 0.06 * (max(shown) - min(shown)))
    low, high = max(-0.02, min(shown) - margin), min(1 + margin, max(shown) + 2 * margin)
    axes.set_ylim(low, high)
    axes.set_yticks([t for t in axes.get_yticks() if max(0.0, low) <= t <= min(1.0, high)])
    _size_axis(axes, group)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_title(f"{title}\nhigher is better", fontsize=11)
    ends, lines = _lines(axes, group, name, looks, ink)
    left, right = axes.get_xlim()
    for role, value in references.items():
        dashes = _REFERENCE_DASHES.get(role, (0, (3, 3)))
        axes.axhline(value, color=ink.muted, linewidth=1.3, linestyle=dashes)
        ends.append(End(right, value, role, ink.muted))
        lines.append([(left, value), (right, value)])
    label_lines(axes, ends, lines, ink)


def _size_axis(axes: Axes, group: Group) -> None:
    """The file_ratio on a log axis; below each ratio the bytes that it means here."""
    ratios = group.ratios()
    low, high = min(ratios) / 1.35, max(ratios) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    octaves = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    halves = (1.0, 1.5) if high / low < 8 else (1.0,)
    ticks = [2.0**k * half for k in octaves for half in halves if low <= 2.0**k * half <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 7)] or [median(ratios)]
    labels = [f"{ratio:.3g}x" for ratio in ticks]
    axes.set_xlabel("times smaller than the fine-tune", labelpad=6)
    if group.checkpoint_bytes:
        checkpoint_bytes = median(group.checkpoint_bytes)
        sizes = [bytes_text(float(f"{checkpoint_bytes / ratio:.2g}")) for ratio in ticks]
        labels = [f"{label}\n{size}" for label, size in zip(labels, sizes, strict=True)]
        axes.set_xlabel("times smaller than the fine-tune, and size of the archive", labelpad=6)
    axes.set_xticks(ticks, labels, fontsize=9)
    axes.set_xticks([], minor=True)


def _lines(
    axes: Axes, group: Group, name: str, looks: dict[str, Look], ink: Ink, floor: float = -math.inf
) -> tuple[list[End], list[Line]]:
    """Draw a line a method; a KL of equal outputs is a lone mark at `floor`. Returns what is drawn."""
    ends: list[End] = []
    lines: list[Line] = []
    for method, points in sorted(group.points.items()):
        look, colour = looks[method], looks[method].colour(ink)
        ordered = sorted(points, key=lambda point: point[0])
        known = [(x, s) for x, s in ordered if getattr(s, name) is not None]
        equal = [(x, s) for x, s in known if name == "kl" and getattr(s, name) <= EXACT_KL]
        drawn = [point for point in known if point not in equal]
        exact = [(x, floor) for x, _ in equal]
        curve = [(x, getattr(s, name)) for x, s in drawn]
        size = 11 if look.mark == "*" else 6.5
        axes.plot(*_columns(exact), look.mark, color=colour, markersize=size)
        axes.errorbar(
            *_columns(curve),
            yerr=[getattr(s, f"{name}_stderr") or 0.0 for _, s in drawn],
            color=colour,
            marker=look.mark,
            markersize=size,
            ecolor=(colour, 0.5),
            elinewidth=1.2,
        )
        if known:
            x, y = max(exact + curve)
            ends.append(End(x, y, look.label, colour))
        lines += [line for line in (exact, curve) if line]
    return ends, lines


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
