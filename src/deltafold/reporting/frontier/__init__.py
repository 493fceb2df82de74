"""What the rows of a frontier record say together: seeds averaged, methods set against each other.

One question matters most: how much smaller is `auto` than the best published recipe, at the same
distance from the fine-tune? With K the lowest KL that a rival has at file ratio 32 and B its bytes,

    factor = B / b      where log KL of auto, linear in log bytes between measured sizes, reaches K at b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from deltafold.reporting.records import FrontierRecord, FrontierRow
from deltafold.reporting.units import EXACT_KL

SUBJECT = "auto"
RIVALS = ("impart-qt", "delta-come", "dare-qt")
COMMON_RATIO, KEPT_RATIO = 32.0, 64.0

Bound = Literal["", "more than", "less than"]


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds of a cell."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Point:
    """One method at one size on one fine-tune: the rows of all its seeds that were met."""

    method: str
    asked: float
    rows: tuple[FrontierRow, ...]

    def figure(self, name: str) -> Spread | None:
        """A field of the rows over the seeds; None where no row has it."""
        values = [getattr(row, name) for row in self.rows]
        known = tuple(value for value in values if value is not None)
        return Spread(known) if known else None

    def value(self, name: str) -> float | None:
        """The mean of a field over the seeds."""
        found = self.figure(name)
        return found.mean if found else None


Grid = dict[str, dict[float, Point]]  # by method, then by the ratio asked for


def finetunes(record: FrontierRecord) -> list[str]:
    """Fine-tunes in the order in which they were measured."""
    return list(dict.fromkeys(row.finetune for row in record.rows))


def grid(record: FrontierRecord, finetune: str) -> Grid:
    """The points of a fine-tune. A cell that cannot be met has a point without rows."""
    cells: dict[tuple[str, float], list[FrontierRow]] = {}
    for row in record.rows:
        if row.finetune == finetune:
            met = cells.setdefault((row.method, row.asked_file_ratio), [])
            met += [row] if row.unmet is None else []
    found: Grid = {}
    for (method, asked), rows in sorted(cells.items()):
        found.setdefault(method, {})[asked] = Point(method, asked, tuple(rows))
    return found


def ordered(points: Grid) -> list[str]:
    """Methods as tables list them: `auto`, then by KL at the common ratio, those without last."""

    def rank(method: str) -> tuple[bool, float, str]:
        point = points[method].get(COMMON_RATIO)
        kl = point.value("kl") if point else None
        return method != SUBJECT, math.inf if kl is None else kl, method

    return sorted(points, key=rank)


def bytes_at(curve: Sequence[tuple[float, float]], kl: float) -> tuple[float, Bound]:
    """Bytes at which a curve of (bytes, KL) reaches `kl`, and how to read them.

    From the largest size down, while the curve is at or below `kl`; between the last such size and
    the next, log KL is taken as linear in log bytes. So a lucky small archive does not count when a
    larger one is worse. "more than": even the smallest measured size is good enough, so the factor
    gained is more than this size says. "less than": no measured size is.
    """
    sizes = sorted(curve, reverse=True)
    wanted = math.log(max(kl, EXACT_KL))
    above: tuple[float, float] | None = None
    for n_bytes, found in sizes:
        x, y = math.log(n_bytes), math.log(max(found, EXACT_KL))
        if y > wanted:
            if above is None:
                return n_bytes, "less than"
            share = (wanted - above[1]) / (y - above[1])
            return math.exp(above[0] + share * (x - above[0])), ""
        above = (x, y)
    return sizes[-1][0], "more than"


@dataclass(frozen=True)
class Advantage:
    """`auto` against the best rival on one fine-tune."""

    rival: Point
    kl: float
    rival_bytes: float
    subject_bytes: float
    bound: Bound

    @property
    def factor(self) -> float:
        """How many times smaller `auto` is at the rival's KL."""
        return self.rival_bytes / self.subject_bytes


def advantage(points: Grid) -> Advantage | None:
    """None where `auto`, or every rival at the common ratio, has not been measured."""
    rivals = [
        (kl, n_bytes, point)
        for method in RIVALS
        if (point := points.get(method, {}).get(COMMON_RATIO)) is not None
        and (kl := point.value("kl")) is not None
        and (n_bytes := point.value("archive_bytes")) is not None
    ]
    curve = [
        (n_bytes, kl)
        for point in points.get(SUBJECT, {}).values()
        if (n_bytes := point.value("archive_bytes")) and (kl := point.value("kl")) is not None
    ]
    if not rivals or not curve:
        return None
    kl, n_bytes, rival = min(rivals, key=lambda item: item[:2])
    return Advantage(rival, kl, n_bytes, *bytes_at(curve, kl))


def gain_kept(record: FrontierRecord, finetune: str, points: Grid) -> float | None:
    """Share of the gain in exact match, base to fine-tune, that `auto` keeps at ratio 64."""
    reference = record.reference.get(finetune, {})
    ends = [scores.exact_match for role in ("base", "fine-tune") if (scores := reference.get(role))]
    point = points.get(SUBJECT, {}).get(KEPT_RATIO)
    kept = point.value("exact_match") if point else None
    if len(ends) < 2 or kept is None:
        return None
    low, high = ends
    if low is None or high is None or high <= low:
        return None
    return (kept - low) / (high - low)
