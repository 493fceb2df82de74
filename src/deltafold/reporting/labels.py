"""Names of lines, written where the lines end instead of in a legend, none over another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from deltafold.reporting.style import Ink

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Sequence[tuple[float, float]]
NEAR_THE_RIGHT = 0.7  # of the width of the axes
POINTS = 10.0  # height of the letters
DISTANCES = (7, 20, 34)  # of a label from its mark, in points, tried in this order
SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))


class End(NamedTuple):
    """Where a line ends, in data coordinates, and what is to be written there."""

    x: float
    y: float
    label: str
    colour: str


def label_lines(axes: Axes, ends: Sequence[End], lines: Sequence[Line], ink: Ink) -> None:
    """Name the lines: in a column right of the axes, or at the end of a line that stops early.

    `lines` are all lines drawn. Call it when limits and layout are final: places follow from them.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    far = [end for end in ends if to_axes.transform((end.x, end.y))[0] >= NEAR_THE_RIGHT]
    label_beside(axes, far)
    label_here(axes, [end for end in ends if end not in far], lines, ink)


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


def label_beside(axes: Axes, ends: Sequence[End]) -> None:
    """Write labels in a column right of the axes, a thin line from each to its end."""
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((end.x, end.y))[1]) for end in ends]
    height_points = axes.get_window_extent().height * 72 / axes.figure.dpi
    heights = spread(wanted, 1.35 * POINTS / height_points, 0.01, 0.99)
    for end, height in zip(ends, heights, strict=True):
        axes.annotate(
            end.label,
            xy=(end.x, end.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            ha="left",
            color=end.colour,
            fontsize=POINTS,
            fontweight="bold",
            annotation_clip=False,
            arrowprops=_leader(end.colour) | {"relpos": (0.0, 0.5)},
        )


def label_here(axes: Axes, ends: Sequence[End], lines: Sequence[Line], ink: Ink) -> None:
    """Write labels beside ends inside the axes, each at the nearest place clear of what is drawn.

    A rim in the ground's colour keeps a label readable where it crosses a line all the same.
    """
    from matplotlib.patheffects import withStroke

    pixels = axes.figure.dpi / 72  # of a typographic point
    taken = _dots([_pixels(axes, line) for line in lines], 4 * pixels)
    for end in ends:
        x, y = _pixels(axes, [(end.x, end.y)])[0]
        half = (0.36 * POINTS * len(end.label) * pixels, 0.65 * POINTS * pixels)
        places = [
            (x + across * (half[0] + away * pixels), y + up * (half[1] + away * pixels))
            for away in DISTANCES
            for across, up in SIDES
        ]
        rooms = [_room(axes, place, half, taken, 4 * pixels) for place in places]
        middle = places[rooms.index(max(rooms))]  # of equals the first, which is the nearest
        axes.annotate(
            end.label,
            xy=(end.x, end.y),
            xytext=((middle[0] - x) / pixels, (middle[1] - y) / pixels),
            textcoords="offset points",
            ha="center",
            va="center",
            color=end.colour,
            fontsize=POINTS,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground=ink.ground)],
            arrowprops=_leader(end.colour),
        )
        rows = [
            [(middle[0] + side * half[0], middle[1] + up * half[1]) for side in (-1, 1)]
            for up in (-1, 0, 1)
        ]
        taken += _dots(rows, 4 * pixels)


def _leader(colour: str) -> dict[str, object]:
    """A thin line from a label to what it names."""
    return {
        "arrowstyle": "-", "color": colour, "alpha": 0.45, "linewidth": 0.8, "shrinkA": 1,
        "shrinkB": 3,
    }  # fmt: skip


def _room(
    axes: Axes,
    middle: tuple[float, float],
    half: tuple[float, float],
    taken: Iterable[tuple[float, float]],
    enough: float,
) -> tuple[bool, float]:
    """Whether a box in pixels lies within the axes, and its distance to what is taken."""
    frame = axes.get_window_extent()
    inside = (
        frame.x0 <= middle[0] - half[0] and middle[0] + half[0] <= frame.x1
        and frame.y0 <= middle[1] - half[1] and middle[1] + half[1] <= frame.y1
    )  # fmt: skip
    distances = (max(abs(x - middle[0]) - half[0], abs(y - middle[1]) - half[1]) for x, y in taken)
    return inside, min(enough, *distances, enough)


def _pixels(axes: Axes, line: Line) -> Line:
    return [(float(x), float(y)) for x, y in axes.transData.transform(line)]


def _dots(lines: Iterable[Line], step: float) -> list[tuple[float, float]]:
    """Points along lines, no more than `step` apart, each corner among them."""
    dots: list[tuple[float, float]] = []
    for line in lines:
        dots += line
        for (x0, y0), (x1, y1) in pairwise(line):
            count = math.ceil(math.hypot(x1 - x0, y1 - y0) / step)
            dots += [
                (x0 + (x1 - x0) * k / count, y0 + (y1 - y0) * k / count) for k in range(1, count)
            ]
    return dots
