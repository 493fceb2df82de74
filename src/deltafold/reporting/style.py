"""How figures look: one colour and mark a method, one colour a role, light and dark.

Colours are those of Okabe and Ito, told apart with every common kind of colour blindness, and a bit
lighter on a dark ground. Matplotlib is imported inside functions: a table needs none of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


@dataclass(frozen=True)
class Ink:
    """The neutral colours of a ground."""

    ground: str
    text: str
    muted: str
    grid: str


LIGHT = Ink(ground="#ffffff", text="#1b1f24", muted="#6a737d", grid="#e4e7eb")
DARK = Ink(ground="#0d1117", text="#e6edf3", muted="#9198a1", grid="#2a313a")


@dataclass(frozen=True)
class Look:
    """How one thing is drawn: its words, its colour on light and on dark, its mark."""

    label: str
    light: str
    dark: str
    mark: str = "o"

    def colour(self, ink: Ink) -> str:
        return self.dark if ink is DARK else self.light


METHODS: dict[str, Look] = {
    "impart": Look("ImPart", "#d55e00", "#ff8a3d", "o"),
    "lowrank": Look("low rank", "#0072b2", "#4db3f0", "s"),
    "magnitude": Look("magnitude", "#009e73", "#2ecc9e", "^"),
    "dare": Look("DARE", "#b5588f", "#e08cc0", "v"),
    "bitdelta": Look("BitDelta", "#b8860b", "#f0c03c", "D"),
    "delta-come": Look("Delta-CoMe", "#3a9bd9", "#8fd3ff", "P"),
    "lossless": Look("lossless", "#4a4a4a", "#c9d1d9", "*"),
    "sparse-patch": Look("sparse patch", "#8a6d3b", "#d2b48c", "X"),
}
_MORE = (
    ("#7b4fa3", "#b794e6", "h"),
    ("#a33b3b", "#f07878", "<"),
    ("#5b7f1e", "#a8cf5f", ">"),
    ("#20808d", "#5fd0dd", "p"),
)
ROLE_LOOKS: dict[str, Look] = {
    "attention": Look("attention", "#0072b2", "#4db3f0", "o"),
    "mlp": Look("MLP", "#d55e00", "#ff8a3d", "s"),
    "expert": Look("experts", "#b8860b", "#f0c03c", "D"),
    "router": Look("routers", "#8a6d3b", "#d2b48c", "X"),
    "embedding": Look("embedding", "#009e73", "#2ecc9e", "^"),
    "head": Look("head", "#b5588f", "#e08cc0", "v"),
    "norm": Look("norms", "#7b4fa3", "#b794e6", "P"),
    "bias": Look("biases", "#20808d", "#5fd0dd", "<"),
    "other": Look("other", "#6a737d", "#9198a1", "h"),
}


def method_looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look a method. Known ones never change; others take what is left, by name."""
    given = sorted(set(methods))
    unknown = [method for method in given if method not in METHODS]
    looks = {method: METHODS[method] for method in given if method in METHODS}
    for number, method in enumerate(unknown):
        light, dark, mark = _MORE[number % len(_MORE)]
        looks[method] = Look(method, light, dark, mark)
    return looks


def role_look(role: str) -> Look:
    return ROLE_LOOKS.get(role, ROLE_LOOKS["other"])


def settings(ink: Ink) -> dict[str, Any]:
    """Matplotlib's settings for all figures. The font comes with matplotlib itself."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": ink.text,
        "axes.edgecolor": ink.muted,
        "axes.labelcolor": ink.text,
        "axes.facecolor": ink.ground,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": ink.grid,
        "grid.linewidth": 0.8,
        "xtick.color": ink.muted,
        "ytick.color": ink.muted,
        "xtick.labelcolor": ink.text,
        "ytick.labelcolor": ink.text,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "figure.facecolor": ink.ground,
        "figure.dpi": DPI,
        "lines.linewidth": 2.0,
        "lines.markersize": 6.5,
        "legend.frameon": False,
        "text.parse_math": False,  # names are shown as they are
    }


def canvas(width: float, height: float, title: str, note: str = "") -> Figure:
    """An empty figure, sizes in inches, with a title above and a line of small print below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, y=0.985, ha="left", va="top", fontsize=14, fontweight="bold")
    if note:
        figure.text(0.01, 0.01, note, ha="left", va="bottom", fontsize=9, alpha=0.75)
    return figure


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, in the order of `wanted` and as near to it as can be.

    Least squares by pooling neighbours (isotonic regression on `wanted[k] - k gap`), then moved
    as a whole into low..high where that is possible.

    >>> spread([0.5, 0.5], 0.1, 0.0, 1.0)
    [0.45, 0.55]
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    pools: list[tuple[float, int]] = []  # (mean, members)
    for place, k in enumerate(order):
        pools.append((wanted[k] - place * gap, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (right, n), (left, m) = pools.pop(), pools.pop()
            pools.append(((left * m + right * n) / (m + n), m + n))
    ceiling = high - (len(wanted) - 1) * gap
    flat = [max(low, min(mean, ceiling)) for mean, members in pools for _ in range(members)]
    placed = [0.0] * len(wanted)
    for place, k in enumerate(order):
        placed[k] = flat[place] + place * gap
    return placed


def label_ends(
    axes: Axes, ends: Sequence[tuple[float, float, str, str]], points: float = 10.0
) -> None:
    """Write labels in a column right of the axes, none over another, a thin line to each end.

    `ends` holds (x, y, label, colour) in data coordinates. Call it when limits and layout are
    final: the places follow from them.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform((x, y)) for x, y, _, _ in ends]
    height_points = axes.get_window_extent().height * 72 / axes.figure.dpi
    gap = points * 1.35 / height_points
    heights = spread([float(place[1]) for place in places], gap, 0.01, 0.99)
    for (x, y, label, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            xy=(x, y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            ha="left",
            color=colour,
            fontsize=points,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.45,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0.0, 0.5),
            },
        )


def label_here(axes: Axes, x: float, y: float, label: str, colour: str, ink: Ink) -> None:
    """Write a label just above a mark, with a rim in the ground's colour against lines below."""
    from matplotlib.patheffects import withStroke

    axes.annotate(
        label,
        (x, y),
        (0, 9),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=colour,
        fontsize=10,
        fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground=ink.ground)],
    )


def plain_ticks(axes: Axes, low: float) -> None:
    """Ticks of a vertical log axis as plain numbers from `low` up: decades, or 1, 2, 5."""
    high = axes.get_ylim()[1]
    steps = (1, 2, 5) if high / low < 300 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 9)]
    axes.set_yticks(ticks, [f"{tick:.6g}" for tick in ticks])
    axes.set_yticks([], minor=True)
