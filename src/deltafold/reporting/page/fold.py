"""The page of a fold: which blocks went, into which, and what that costs."""

from __future__ import annotations

from deltafold.reporting.page.answers import (
    divergence_text,
    quality_numbers,
    samples_of,
    share_text,
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
from deltafold.reporting.records.fold import FoldRecord, FoldStep
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    number_text,
    seconds_text,
)

PARTS = ("attention", "mlp")


def fold_view(record: FoldRecord) -> View:
    """How much shallower, at what cost, and block by block what became of it."""
    gone = len(record.removed.blocks)
    return View(
        kind="fold",
        title=record.title,
        sentence=(
            f"{gone} of {record.blocks} blocks gone by {record.method.name}; "
            "an ordinary model of what is left."
        ),
        numbers=_numbers(record),
        picture=_picture(record),
        map=_map(record),
        samples=samples_of(record.scores),
    )


def _numbers(record: FoldRecord) -> list[Headline]:
    removed = record.removed
    took = f"in {seconds_text(record.seconds)}, peak memory {bytes_text(record.peak_memory_bytes)}"
    blocks = f"{len(removed.blocks)} of {record.blocks} blocks, {took}"
    numbers = [Headline(share_text(removed.parameter_share), "fewer parameters", blocks)]
    numbers += quality_numbers(record.scores)
    if len(record.scores) == 2:
        before, after = record.scores
        if before.tokens_per_second and after.tokens_per_second:
            faster = after.tokens_per_second / before.tokens_per_second
            note = (
                f"{number_text(after.tokens_per_second)} tokens a second, "
                f"before {number_text(before.tokens_per_second)}"
            )
            numbers.append(Headline(f"{faster:.2f}x", "as fast", note))
    elif record.quality:
        stage, found = list(record.quality.items())[-1]
        if found.perplexity is not None:
            note = f"{stage}, on held-out text; KL {divergence_text(found.kl)}"
            numbers.append(Headline(number_text(found.perplexity), "perplexity", note))
    return numbers


def _picture(record: FoldRecord) -> Picture:
    kept = set(record.kept)
    before = [
        Segment(f"block {n}", 1.0, "kept" if n in kept else "gone", "strong", n not in kept)
        for n in range(record.blocks)
    ]
    after = [Segment(f"block {n}", 1.0, "kept", "strong") for n in record.kept]
    bars = (
        Bar("before", f"{record.blocks} blocks", before),
        Bar("after", f"{len(record.kept)} blocks", after),
    )
    return Picture("The blocks; hollow ones went", bars, float(record.blocks), legend=False)


def _map(record: FoldRecord) -> Map:
    alike = record.similarity
    known = alike is not None and len(alike.values) > record.blocks
    measures = [Measure("what became of it", "Coloured: kept. Plain: gone, or silent.")]
    if known and alike is not None:
        note = f"{alike.name} of the states before and after a block; high is little done by it."
        measures.append(Measure("alike", note))
    near = [alike.values[n][n + 1] for n in range(record.blocks)] if known and alike else []
    return Map(
        title="Block by block",
        measures=measures,
        columns=["block", *PARTS],
        colours=["", *PARTS],
        places=[_place(record, number, near) for number in range(record.blocks)],
        line_columns=["step", "what went", "into", "its share", "score"],
        hint="Choose a block to see its steps.",
    )


def _place(record: FoldRecord, number: int, near: list[float]) -> Place:
    kept = number in record.kept
    silent = {each.part for each in record.silenced if each.block == number}
    low, high = (min(near), max(near)) if near else (0.0, 1.0)
    alike = (near[number] - low) / ((high - low) or 1.0) if near else None
    steps = [
        (order, step)
        for order, step in enumerate(record.steps, start=1)
        if number in step.gone or number == step.kept
    ]
    into = next((step.kept for _, step in steps if number in step.gone), None)
    whole = "kept" if kept else "gone" if into is None else f"into {into}"
    words = [whole]
    for part in PARTS:
        quiet = any(name.startswith(part) or part.startswith(name) for name in silent)
        words.append("silent" if kept and quiet else "kept" if kept else "gone")
    cells = [
        Cell(
            (0.7 if word == "kept" else None, *([round(alike, 3)] if alike is not None else [])),
            (word, *([number_text(near[number])] if near else [])),
        )
        for word in words
    ]
    title = f"Block {number}"
    told = "It is kept." if kept else "It is gone."
    if not steps:
        told += " No step concerns it."
    return Place(str(number), title, cells, [_line(order, step) for order, step in steps], told)


def _line(order: int, step: FoldStep) -> Line:
    gone = ", ".join(map(str, step.gone)) + (f" ({step.part})" if step.part else "")
    return Line(
        0,
        (
            str(order),
            f"block {gone}",
            MISSING if step.kept is None else f"block {step.kept}",
            MISSING if step.ratio is None else f"{step.ratio:.3f}",
            MISSING if step.score is None else f"{step.score:.4g}",
        ),
    )
