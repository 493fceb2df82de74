"""`auto`: several choices of blocks, each healed in closed form; the one that predicts most alike.

    greedy       one block after another, each time the one whose absence costs least KL
    contiguous   the blocks in a row whose absence costs least KL
    angular      the blocks in a row that turn the last token least
    influence    the blocks that turn the states least, one by one (ShortGPT's)

All are dropped and healed by least squares on a part of the text, from the first cut through to the
end, and compared by their KL to the model on samples that nothing else sees. The best two are healed
again, on all the text, and compared again: what a part favours need not be best with more.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deltafold.calibration import Sample
from deltafold.engine import Progress, Step
from deltafold.errors import MismatchError
from deltafold.folding.draft import Draft
from deltafold.folding.presets import Method, Preset
from deltafold.verbs.fold_job import Job
from deltafold.verbs.fold_patch import Patcher, Reach
from deltafold.verbs.fold_states import Probe, States
from deltafold.verbs.fold_work import Folded, Folder, Row

WAYS = {
    "greedy": Preset("kl", "lazy", "drop"),
    "contiguous": Preset("kl", "stretch", "drop"),
    "angular": Preset("angular", "contiguous", "drop"),
    "influence": Preset("cosine", "lowest", "drop"),
}


FINALISTS = 2
"""Candidates that are healed on all the text."""


@dataclass
class Candidate:
    """A fold, and its figures on samples held out."""

    label: str
    folded: Folded
    measured: dict[str, float]

    @property
    def kl(self) -> float:
        return self.measured["kl"]

    def row(self) -> Row:
        """For the record."""
        return {"way": self.label, "removed": _gone(self.folded), **self.measured}


def fold_best(
    job: Job,
    states: States,
    whole: Draft,
    closed_form: str | None,
    probe: Callable[[], Probe],
    judged: Sequence[Sample],
    seed: int = 0,
    progress: Progress | None = None,
) -> Folded:
    """The best of the candidates, with every candidate's figures in its notes.

    `judged` are the samples that they are compared on.
    """
    unhealed = _choices(job, states, whole, probe, seed, progress)
    with contextlib.closing(Probe(states.model, whole, judged)) as judge:

        def tell(label: str, done: int, total: int) -> None:
            if progress:
                progress(Step("heal", label, float(done), float(total), 0))

        if closed_form == "none":
            found = [
                Candidate(name, folded, judge.measure(folded.draft)) for name, folded in unhealed
            ]
        else:
            reach: Reach = "cut" if closed_form == "cut" else "through"
            healed = functools.partial(_healed, judge=judge, whole=whole, reach=reach)
            total, found = len(unhealed) + FINALISTS, []
            with contextlib.closing(states.part(whole)) as part:
                for name, folded in unhealed:
                    tell(f"{name}, on a part", len(found), total)
                    label = f"{name}, healed {reach} on a part"
                    found.append(healed(label, folded, part))
            order = sorted(range(len(unhealed)), key=lambda number: found[number].kl)
            for number in order[:FINALISTS]:
                name, folded = unhealed[number]
                tell(name, len(found), total)
                found.append(healed(f"{name}, healed {reach}", folded, states))
    finals = found[len(unhealed) :] or found
    chosen = min(finals, key=lambda each: each.kl)
    chosen.folded.notes = {"candidates": [each.row() for each in found], "chosen": chosen.label}
    return chosen.folded


def _healed(
    label: str, folded: Folded, text: States, judge: Probe, whole: Draft, reach: Reach
) -> Candidate:
    """A choice of blocks healed on a text, and its figures."""
    draft, patches = Patcher(text, whole).patched(folded.draft, "heal", reach)
    made = replace(folded, draft=draft, patches=patches, unhealed=folded.draft)
    return Candidate(label, made, judge.measure(draft))


def _choices(
    job: Job,
    states: States,
    whole: Draft,
    probe: Callable[[], Probe],
    seed: int,
    progress: Progress | None,
) -> list[tuple[str, Folded]]:
    """Every way's choice of blocks, dropped; equal ones once. Raises MismatchError for none."""
    found: dict[tuple[int, ...], tuple[str, Folded]] = {}
    for name, preset in WAYS.items():
        way = replace(job, method=Method(name, preset))
        with contextlib.suppress(MismatchError):  # no stretch of blocks is free
            folded = Folder(way, states, probe, seed, progress=progress).fold(whole)
            found.setdefault(tuple(_gone(folded)), (name, folded))
    if not found:
        raise MismatchError("No choice of blocks is left; protect fewer, or ask for fewer.")
    return list(found.values())


def _gone(folded: Folded) -> list[int]:
    kept = set(folded.draft.numbers)
    return [number for number in range(folded.draft.layout.depth) if number not in kept]
