"""The page of a merge: what is left of each model, and where models agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deltafold.reporting.page.answers import (
    label_of,
    right_on,
    right_share,
    samples_of,
    share_text,
    short,
)
from deltafold.reporting.page.places import (
    MOST_LINES,
    by_block,
    column_of,
    role_map,
    roles_in_blocks,
)
from deltafold.reporting.page.view import (
    Bar,
    Cell,
    Headline,
    Line,
    Map,
    Measure,
    Picture,
    Place,
    Segment,
    View,
)
from deltafold.reporting.records.merge import MergedTensor, MergeRecord
from deltafold.reporting.tables.merge import agreed, mean_cosine
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    number_text,
    seconds_text,
)

MEASURES = (
    Measure("change", "Norm of the merged delta; a stronger colour is more."),
    Measure(
        "agreement",
        "Of the entries that several models change, those whose changes have one sign.",
    ),
    Measure("cosine", "Between the deltas of two models, mean over pairs."),
)


def merge_view(record: MergeRecord) -> View:
    """What one model of several can do, and where their deltas pull apart."""
    names = [short(label) for label in record.models]
    return View(
        kind="merge",
        title=record.title,
        sentence=(
            f"{', '.join(names[:-1])} and {names[-1]}, fine-tunes of "
            f"{short(record.base) or 'one base'}, in one model by {_method(record)}."
            if len(names) > 1
            else f"{names[0]} on {short(record.base) or 'its base'} by {_method(record)}."
        ),
        numbers=_numbers(record),
        picture=_picture(record),
        map=_map(record),
        samples=samples_of(record.scores),
    )


def _method(record: MergeRecord) -> str:
    return str(record.recipe.get("method") or record.recipe.get("consensus") or "merging")


def _numbers(record: MergeRecord) -> list[Headline]:
    numbers = [Headline(str(len(record.models)), "fine-tunes in one model")]
    last = record.scores[-1] if record.scores else None
    if last is not None and (share := right_share(last)) is not None:
        parts = [
            f"{label_of(each, record.scores)} {share_text(right_share(each))}"
            for each in record.scores[:-1]
        ]
        numbers.append(Headline(share_text(share), "right, mean of tasks", ", ".join(parts)))
    if (share := agreed(record.floats)) is not None:
        note = "of entries that several models change, those that go one way"
        numbers.append(Headline(share_text(share), "of changes agree", note))
    size = record.archive.archive_bytes if record.archive else record.output_bytes
    took = f"in {seconds_text(record.seconds)}, peak memory {bytes_text(record.peak_memory_bytes)}"
    return [*numbers, Headline(bytes_text(size or None), "written", took)]


def _picture(record: MergeRecord) -> Picture:
    """Right answers, a bar a task and model; without tasks, how much of each delta is left."""
    tasks = list(dict.fromkeys(task for model in record.scores for task in model.metrics.tasks))
    if tasks:
        bars = []
        for task in tasks:
            for model in record.scores:
                share = right_on(model, task) or 0.0
                label = f"{task}: {label_of(model, record.scores)}"
                tone = "strong" if model is record.scores[-1] else "soft"
                part = Segment(label_of(model, record.scores), share, share_text(share), tone)
                bars.append(Bar(label, share_text(share), [part]))
        return Picture("Share of answers right", bars, 1.0, legend=False)
    bars = []
    for number, name in enumerate(record.short):
        left = _share_left(record.floats, number)
        bars.append(
            Bar(name, share_text(left), [Segment(name, max(0.0, left or 0.0), "", "strong")])
        )
    top = max([1.0, *(bar.segments[0].size for bar in bars)])
    note = "<merged, D> / <D, D>, 100 % where a model's delta is there in full."
    return Picture("What is left of each delta", bars, top, legend=False, note=note)


def _share_left(tensors: Sequence[MergedTensor], model: int) -> float | None:
    """<merged, D> / <D, D>, all tensors taken as one."""
    squares = [(t.norms[model] ** 2, t.brought[model]) for t in tensors if t.norms is not None]
    whole = math.fsum(square for square, _ in squares)
    return math.fsum(square * (part or 0.0) for square, part in squares) / whole if whole else None


def _map(record: MergeRecord) -> Map | None:
    groups = by_block(record.floats)
    if not groups:
        return None
    roles = roles_in_blocks(record.floats)
    if rest := [t for t in record.floats if t.block is None]:
        groups.append(("other", "Outside of blocks", rest))
    most = max((_norm(lines) for _, _, lines in groups), default=0.0) or 1.0
    return role_map(
        MEASURES if len(record.models) > 1 else MEASURES[:1],
        roles,
        [_place(*group, roles, most) for group in groups],
        ["tensor", "change", "agree", "cosine"],
    )


def _place(
    label: str, title: str, lines: Sequence[MergedTensor], roles: Sequence[str], most: float
) -> Place:
    named = lines[0].block is not None
    cells = [_cell(lines, most)]
    cells += [
        _cell([t for t in lines if t.role == role], most) if named else None for role in roles
    ]
    summary = f"{len(lines)} tensors."
    if len(lines) > MOST_LINES:
        summary = f"{len(lines)} tensors; those changed most are listed."
        lines = sorted(lines, key=lambda t: -t.norm)[:MOST_LINES]
    return Place(label, title, cells, [_line(t, roles) for t in lines], summary)


def _norm(lines: Sequence[MergedTensor]) -> float:
    return math.sqrt(math.fsum(t.norm**2 for t in lines))


def _cell(lines: Sequence[MergedTensor], most: float) -> Cell | None:
    if not lines:
        return None
    norm, share, cosine = _norm(lines), agreed(lines), mean_cosine(lines)
    return Cell(
        shades=(
            round(norm / most, 3),
            None if share is None else round(share, 3),
            None if cosine is None else round(abs(cosine), 3),
        ),
        texts=(number_text(norm), share_text(share), number_text(cosine)),
    )


def _line(tensor: MergedTensor, roles: Sequence[str]) -> Line:
    cosine = mean_cosine([tensor])
    return Line(
        column_of(tensor, roles),
        (
            tensor.name,
            number_text(tensor.norm),
            share_text(tensor.agreed) if tensor.shared else MISSING,
            number_text(cosine),
        ),
    )
