"""How figures look: one colour and mark a method, one colour a role, light and dark.

Colours are those of Okabe and Ito, told apart with every common kind of colour blindness, and a bit
lighter on a dark ground. Matplotlib is imported inside functions: a table needs none of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    "auto": Look("auto", "#000000", "#ffffff", "8"),
    "impart": Look("ImPart", "#d55e00", "#ff8a3d", "o"),
    "impart-qt": Look("ImPart-Qt", "#8f3300", "#ffb37f", "H"),
    "lowrank": Look("low rank", "#0072b2", "#4db3f0", "s"),
    "svd-quant": Look("SVD-quant", "#5a3fb0", "#b9a6ff", "d"),
    "magnitude": Look("magnitude", "#009e73", "#2ecc9e", "^"),
    "dare": Look("DARE", "#b5588f", "#e08cc0", "v"),
    "dare-qt": Look("DARE-Qt", "#6e1d4f", "#f5bfdf", "1"),
    "bitdelta": Look("BitDelta", "#b8860b", "#f0c03c", "D"),
    "delta-come": Look("Delta-CoMe", "#3a9bd9", "#8fd3ff", "P"),
    "lossless": Look("lossless", "#4a4a4a", "#c9d1d9", "*"),
    "context": Look("context", "#2f5d62", "#8fc7cc", "p"),
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


def plain_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks of a log axis between two values: decades, or finer. Plain numbers down to 0.0001."""
    steps: tuple[float, ...] = (1,)
    if high / low < 300:
        steps = (1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 9) or 1]
    return ticks, [
        f"{tick:.10f}".rstrip("0").rstrip(".")
        if tick > 5e-5
        else f"{tick:.0e}".replace("e-0", "e-")
        for tick in ticks
    ]
