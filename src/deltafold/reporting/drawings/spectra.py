"""What the delta is like: singular values of a few tensors, one of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltafold.reporting.labels import End, Line, label_lines
from deltafold.reporting.records import KnownRecord
from deltafold.reporting.records.compress import CompressRecord, TensorLine
from deltafold.reporting.style import Ink, canvas, plain_ticks, role_look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TENSORS = 8  # the seven projections of a Llama block and the embedding
_DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """A figure an archive whose record holds spectra."""
    for record in records:
        if isinstance(record, CompressRecord) and (chosen := representative(record.tensors)):
            yield f"spectra {record.title}", _figure(record, chosen, ink)


def kind_of(name: str) -> str:
    """The name of a tensor without its block and its ending.

    >>> kind_of("model.layers.11.mlp.up_proj.weight")
    'mlp.up_proj'
    """
    short = re.sub(r"^.*\.\d+\.|\.weight$", "", name)
    return short.removeprefix("model.")


def representative(tensors: Sequence[TensorLine]) -> list[TensorLine]:
    """Of each kind of tensor with a spectrum the one in the middle block; at most a few kinds.

    Kinds are taken evenly over those there are, so that attention and MLP are both shown.
    """
    kinds: dict[str, list[TensorLine]] = {}
    for tensor in tensors:
        if tensor.spectrum and sum(point.value > 0 for point in tensor.spectrum) > 1:
            kinds.setdefault(kind_of(tensor.name), []).append(tensor)
    middle = [lines[len(lines) // 2] for lines in kinds.values()]
    count = min(MOST_TENSORS, len(middle))
    return [middle[k * len(middle) // count] for k in range(count)]


def _figure(record: CompressRecord, tensors: list[TensorLine], ink: Ink) -> Figure:
    figure = canvas(
        9.6,
        4.8,
        f"Singular values of the delta: {record.title}",
        "One tensor of each kind, from the middle block; as many singular values as the method "
        "used.\nA steep line means that few directions hold most of the delta.",
    )
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.095, right=0.78, top=0.885, bottom=0.23)
    ends: list[End] = []
    lines: list[Line] = []
    seen = dict.fromkeys((t.role for t in tensors), 0)
    for tensor in tensors:
        points = [p for p in tensor.spectrum or [] if p.value > 0]
        colour = role_look(tensor.role).colour(ink)
        dashes = _DASHES[seen[tensor.role] % len(_DASHES)]
        seen[tensor.role] += 1
        line = [(p.index + 1.0, p.value) for p in points]
        axes.plot([x for x, _ in line], [y for _, y in line], color=colour, linestyle=dashes)
        ends.append(End(*line[-1], kind_of(tensor.name), colour))
        lines.append(line)
    axes.set_yscale("log")
    axes.set_xscale("log")
    most = max(end.x for end in ends)
    axes.set_xlim(0.95, 1.05 * most)
    axes.set_xticks(*plain_ticks(1, most))
    axes.set_xticks([], minor=True)
    values = [p.value for t in tensors for p in t.spectrum or [] if p.value > 0]
    axes.set_ylim(min(values) / 1.4, max(values) * 1.4)
    axes.set_yticks(*plain_ticks(min(values) / 1.4, max(values) * 1.4))
    axes.set_yticks([], minor=True)
    axes.set_xlabel("number of the singular value, largest first")
    axes.set_ylabel("singular value")
    label_lines(axes, ends, lines, ink)
    return figure
