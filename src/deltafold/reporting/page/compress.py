"""The page of a compression: where the bytes are, block by block and role by role."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deltafold.reporting.page.answers import quality_numbers, samples_of, short
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
from deltafold.reporting.records.compress import CompressRecord, TensorLine
from deltafold.reporting.style import role_look
from deltafold.reporting.tables import by_role, other_bytes, relative_error
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    number_text,
    ratio_text,
    seconds_text,
    smaller_text,
)

MEASURES = (
    Measure("bytes stored", "Bytes of the archive that a place takes; a stronger colour is more."),
    Measure(
        "times smaller",
        "Bytes in the checkpoint / bytes in the archive; a stronger colour is less saved.",
    ),
    Measure(
        "error",
        "Norm of what the archive gets wrong in the delta / norm of the delta. 0 is exact, 1 leaves "
        "the delta out; methods that draw at random lie above, and are right on average.",
    ),
)


def compress_view(record: CompressRecord) -> View:
    """What one gets, what it costs, and where."""
    return View(
        kind="compress",
        title=record.title,
        sentence=(
            f"{short(record.finetuned) or 'A fine-tune'}, stored as its difference from "
            f"{short(record.base) or 'its base'} by the method {record.method}."
        ),
        numbers=_numbers(record),
        picture=_picture(record),
        map=_map(record.tensors),
        samples=samples_of(record.scores),
    )


def _numbers(record: CompressRecord) -> list[Headline]:
    totals = record.totals
    ratio, direction = smaller_text(totals.file_ratio).split(" ")
    sizes = f"{bytes_text(totals.archive_bytes)} in place of {bytes_text(totals.checkpoint_bytes)}"
    quality = quality_numbers(record.scores)
    if not quality and (error := relative_error(record.tensors)) is not None:
        note = "norm of what is wrong / norm of the delta"
        quality = [Headline(number_text(error), "error of the delta", note)]
    return [
        Headline(ratio, direction, sizes),
        *quality,
        Headline(
            seconds_text(record.seconds),
            "to compress",
            f"peak memory {bytes_text(record.peak_memory_bytes)}",
        ),
    ]


def _picture(record: CompressRecord) -> Picture:
    """Both on one scale; then the archive as wide as the page, by what is in it."""
    totals = record.totals
    held, stored = [], []
    for role, lines in by_role(record.tensors):
        label = role_look(role).label
        in_checkpoint = sum(t.checkpoint_bytes for t in lines)
        in_archive = sum(t.bytes for t in lines)
        held.append(Segment(label, in_checkpoint, bytes_text(in_checkpoint), role))
        stored.append(Segment(label, in_archive, bytes_text(in_archive), role))
    for name, (before, after) in other_bytes(record).items():
        held.append(Segment(name, before, bytes_text(before)))
        stored.append(Segment(name, after, bytes_text(after)))
    return Picture(
        title="The fine-tune and its archive, to scale",
        bars=(
            Bar("fine-tune", bytes_text(totals.checkpoint_bytes), [s for s in held if s.size]),
            Bar("archive", bytes_text(totals.archive_bytes), [s for s in stored if s.size]),
        ),
        scale=float(max(totals.checkpoint_bytes, totals.archive_bytes)),
        zoom=totals.archive_bytes < totals.checkpoint_bytes / 2,
    )


def _map(tensors: Sequence[TensorLine]) -> Map | None:
    groups = by_block(tensors)
    if not groups:
        return None
    inside = [t for t in tensors if t.block is not None]
    roles = roles_in_blocks(tensors)
    around = [
        (role_look(role).label, f"Outside of blocks: {role_look(role).label}", lines)
        for role, lines in by_role(t for t in tensors if t.block is None)
    ]
    groups = [g for g in around if g[0] == "embedding"] + groups + [
        g for g in around if g[0] != "embedding"
    ]  # fmt: skip
    scales = _scales([lines for _, _, lines in groups], inside, roles)
    return role_map(
        MEASURES if relative_error(tensors) is not None else MEASURES[:2],
        roles,
        [_place(*group, roles, scales) for group in groups],
        ["tensor", "codec", "checkpoint", "archive", "error"],
    )


Scales = tuple[tuple[float, float, float], tuple[float, float, float]]
"""The figure that is darkest, a measure each: of whole places, and of roles within a block."""


def _scales(
    whole: Sequence[Sequence[TensorLine]], inside: Sequence[TensorLine], roles: Sequence[str]
) -> Scales:
    cells = [
        [t for t in inside if t.role == role and t.block == block]
        for role in roles
        for block in {t.block for t in inside}
    ]
    return _most(whole), _most(cells)


def _most(groups: Iterable[Sequence[TensorLine]]) -> tuple[float, float, float]:
    figures = [_figures(lines) for lines in groups if lines]
    return (
        max((stored for stored, _, _ in figures), default=0.0) or 1.0,
        max((share for _, share, _ in figures), default=0.0) or 1.0,
        max((error or 0.0 for _, _, error in figures), default=0.0) or 1.0,
    )


def _figures(lines: Sequence[TensorLine]) -> tuple[float, float, float | None]:
    """Bytes stored; those as a share of the checkpoint's; relative error."""
    stored = sum(t.bytes for t in lines)
    return stored, stored / (sum(t.checkpoint_bytes for t in lines) or 1), relative_error(lines)


def _cell(lines: Sequence[TensorLine], most: tuple[float, float, float]) -> Cell | None:
    if not lines:
        return None
    stored, share, error = _figures(lines)
    return Cell(
        shades=(
            _rounded(stored / most[0]),
            _rounded(share / most[1]),
            None if error is None else _rounded(error / most[2]),
        ),
        texts=(
            bytes_text(stored),
            ratio_text(1 / share) if share else "free",
            "exact" if error is None else number_text(error),
        ),
    )


def _rounded(shade: float) -> float:
    return round(shade, 3)


def _place(
    label: str, title: str, lines: Sequence[TensorLine], roles: Sequence[str], scales: Scales
) -> Place:
    named = lines[0].block is not None
    cells: list[Cell | None] = [_cell(lines, scales[0])]
    cells += [_cell([t for t in lines if t.role == role], scales[1]) for role in roles if named]
    held, stored = sum(t.checkpoint_bytes for t in lines), sum(t.bytes for t in lines)
    listed = lines
    summary = f"{len(lines)} tensors, {bytes_text(held)} stored in {bytes_text(stored)}"
    if len(lines) > MOST_LINES:
        listed = sorted(lines, key=lambda t: -t.bytes)[:MOST_LINES]
        rest = stored - sum(t.bytes for t in listed)
        summary += f"; the largest {MOST_LINES} are listed, the others take {bytes_text(rest)}"
    cells += [None] * (len(roles) + 1 - len(cells))
    return Place(label, title, cells, [_line(t, roles) for t in listed], f"{summary}.")


def _line(tensor: TensorLine, roles: Sequence[str]) -> Line:
    return Line(
        column_of(tensor, roles),
        (
            tensor.name,
            tensor.codec,
            bytes_text(tensor.checkpoint_bytes),
            bytes_text(tensor.bytes) if tensor.bytes else MISSING,
            "exact" if tensor.relative_error is None else number_text(tensor.relative_error),
        ),
        tensor.why or "",
    )
