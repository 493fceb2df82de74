"""`auto`: several ways to fold, each healed in closed form; the one that predicts most alike.

    contiguous   the blocks in a row that turn the last token least (angular), dropped
    greedy       one block after another, each time the one whose absence costs least KL, dropped

Both are then healed by least squares, and compared by their KL to the model on samples that no least
squares saw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from deltafold.engine import Progress
from deltafold.errors import MismatchError
from deltafold.folding.draft import Draft
from deltafold.folding.presets import Method, Preset
from deltafold.verbs.fold_job import Job
from deltafold.verbs.fold_patch import Patcher, Reach
from deltafold.verbs.fold_states import Probe, States
from deltafold.verbs.fold_work import Folded, Folder

WAYS = {
    "greedy": Preset("kl", "lazy", "drop"),
    "contiguous": Preset("angular", "contiguous", "drop"),
}
REACHES: tuple[Reach, ...] = ("cut", "through")


def fold_best(
    job: Job,
    states: States,
    whole: Draft,
    closed_form: str | None,
    probe: Callable[[], Probe],
    seed: int = 0,
    progress: Progress | None = None,
) -> Folded:
    """The best of the candidates, with every candidate's figures in its notes."""
    found: list[tuple[float, str, Folded]] = []
    rows = []
    reaches: tuple[Reach | None, ...] = (
        (None,) if closed_form == "none"
        else REACHES if closed_form is None
        else (closed_form,)  # type: ignore[assignment]
    )  # fmt: skip
    with (
        contextlib.closing(Probe(states.model, whole, states.held_out())) as judge,
        contextlib.closing(Patcher(states, whole)) as patcher,
    ):
        for name, preset in WAYS.items():
            try:
                way = replace(job, method=Method(name, preset))
                folded = Folder(way, states, probe, seed, progress=progress).fold(whole)
            except MismatchError:  # no stretch of blocks is free
                continue
            for reach in reaches:
                made = replace(folded, patches=[])
                if reach is not None:
                    made.unhealed = folded.draft
                    made.draft, made.patches = patcher.patched(folded.draft, "heal", reach)
                measured = judge.measure(made.draft)
                label = f"{name}, healed {reach}" if reach else name
                rows.append({"way": label, "removed": _gone(made), **measured})
                found.append((measured["kl"], label, made))
    if not found:
        raise MismatchError("No choice of blocks is left; protect fewer, or ask for fewer.")
    _, label, best = min(found, key=lambda each: each[0])
    best.notes = {"candidates": rows, "chosen": label}
    return best


def _gone(folded: Folded) -> list[int]:
    kept = set(folded.draft.numbers)
    return [number for number in range(folded.draft.layout.depth) if number not in kept]
