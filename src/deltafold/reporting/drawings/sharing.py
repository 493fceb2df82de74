"""The training of a shared model: its losses, and how its modules took over from the originals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltafold.reporting.records import KnownRecord
from deltafold.reporting.records.share import Replacement, ShareRecord
from deltafold.reporting.style import Ink, canvas, role_look

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(records: Sequence[KnownRecord], ink: Ink) -> Iterator[tuple[str, Figure]]:
    """A loss curve and the probabilities of replacement for each model that was trained."""
    for record in records:
        if isinstance(record, ShareRecord):
            if record.curve:
                yield f"loss {record.title}", _losses(record, ink)
            if record.replacement is not None:
                yield f"replacement {record.title}", _probabilities(record, record.replacement, ink)


def _losses(record: ShareRecord, ink: Ink) -> Figure:
    figure = canvas(
        8.4,
        4.8,
        f"Training: {record.title}",
        "Lines: batches of training, with the modules drawn for each step. Marks: held-out text with "
        "all\nmodules replaced; the state with the lowest KL there is kept.",
    )
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.09, right=0.97, top=0.86, bottom=0.22)
    looks = {"ce": role_look("attention"), "kl": role_look("mlp")}
    words = {"ce": "cross-entropy", "kl": "KL from the whole model"}
    steps = [point.step for point in record.curve]
    for key, look in looks.items():
        values = [getattr(point, key) for point in record.curve]
        axes.plot(steps, values, color=look.colour(ink), linewidth=1.2, label=words[key])
        axes.plot(
            [point.step for point in record.exams],
            [getattr(point, key) for point in record.exams],
            look.mark,
            color=look.colour(ink),
            label=f"{words[key]}, held out",
        )
    if record.best_step is not None:
        axes.axvline(record.best_step, color=ink.muted, linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.legend()
    return figure


def _probabilities(record: ShareRecord, found: Replacement, ink: Ink) -> Figure:
    figure = canvas(
        8.4,
        4.4,
        f"When modules take over: {record.title}",
        "Probability that a shared module is used in a step, and not the original in its place.",
    )
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.09, right=0.97, top=0.86, bottom=0.2)
    steps = [point.step for point in found.points]
    count = len(found.modules)
    for place, name in enumerate(found.modules):
        values = [point.probabilities[place] for point in found.points]
        shade = 1 - 0.7 * place / max(1, count - 1)
        axes.plot(steps, values, color=role_look("mlp").colour(ink), alpha=shade, label=name)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("step")
    axes.set_ylabel("probability")
    if count <= 8:
        axes.legend(loc="lower right")
    else:
        axes.text(0.99, 0.04, f"dark: {found.modules[0]}, pale: {found.modules[-1]}",
                  transform=axes.transAxes, ha="right", color=ink.muted)  # fmt: skip
    return figure
