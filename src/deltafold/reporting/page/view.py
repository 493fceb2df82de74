"""What the page shows of a run, whatever its kind: numbers, a picture, a map, answers.

All texts are ready to be read and all shades lie between 0 and 1, so that the page's script computes
nothing. Everything here becomes JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Headline:
    """A big number, what it is, and what it is to be compared with."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Segment:
    """A part of a bar. `colour` is a role or a tone of the page; `hollow`: what is gone."""

    label: str
    size: float
    text: str = ""
    colour: str = "other"
    hollow: bool = False


@dataclass(frozen=True)
class Bar:
    label: str
    text: str
    segments: Sequence[Segment]


@dataclass(frozen=True)
class Picture:
    """Bars on one scale, from 0 to `scale`. `zoom`: the last bar is drawn again, as wide as can be."""

    title: str
    bars: Sequence[Bar]
    scale: float
    zoom: bool = False
    legend: bool = True
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """A way to colour the map."""

    label: str
    note: str


@dataclass(frozen=True)
class Cell:
    """Of a place on the map: a shade and a text a measure. A shade of None has no colour."""

    shades: Sequence[float | None]
    texts: Sequence[str]


@dataclass(frozen=True)
class Line:
    """A row of what lies behind a place: `column` says which one of the map's it belongs to."""

    column: int
    cells: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Place:
    """A row of the map. `cells` run over the map's columns; None where there is nothing."""

    label: str
    title: str
    cells: Sequence[Cell | None]
    lines: Sequence[Line]
    summary: str = ""


@dataclass(frozen=True)
class Map:
    """Blocks by roles. The first column is the whole block."""

    title: str
    measures: Sequence[Measure]
    columns: Sequence[str]
    colours: Sequence[str]
    places: Sequence[Place]
    line_columns: Sequence[str]
    hint: str


@dataclass(frozen=True)
class Written:
    """What one model wrote to a prompt."""

    label: str
    text: str
    right: bool


@dataclass(frozen=True)
class Sample:
    task: str
    prompt: str
    wanted: str
    written: Sequence[Written]


@dataclass(frozen=True)
class View:
    """A run. `sentence` says what it did."""

    kind: str
    title: str
    sentence: str
    numbers: Sequence[Headline] = ()
    picture: Picture | None = None
    map: Map | None = None
    samples: Sequence[Sample] = field(default=())
