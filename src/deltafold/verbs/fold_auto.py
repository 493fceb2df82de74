"""`auto`: several choices of blocks, each healed in closed form; the one that predicts most alike.

    greedy       one block after another, each time the one whose absence costs least KL
    contiguous   the blocks in a row whose absence costs least KL
    angular      the blocks in a row that turn the last token least
    influence    the blocks that turn the states least, one by one (ShortGPT's)

All are dropped and healed by least squares on a part of the text, from the first cut through to the
end, and compared by their KL to the model on samples that no least squares saw. The best is healed
again on all the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from deltafold.engine import Progress
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
    seed: int = 0,
    progress: Progress | None = None,
) -> Folded:
    """The best of the candidates, with every candidate's figures in its notes."""
    unhealed = _choices(job, states, whole, probe, seed, progress)
    found: list[Candidate] = []
    with (
        contextlib.closing(Probe(states.model, whole, states.held_out())) as judge,
        contextlib.closing(states.thinned()) as part,
    ):

        def candidate(
            name: str, folded: Folded, text: States | None, reach: Reach | None
        ) -> Candidate:
            made = replace(folded, patches=[])
            if text is None or reach is None:
                return Candidate(name, made, judge.measure(made.draft))
            made.unhealed = folded.draft
            made.draft, made.patches = Patcher(text, whole).patched(folded.draft, "heal", reach)
            extent = "" if text is states else " on a part"
            return Candidate(f"{name}, healed {reach}{extent}", made, judge.measure(made.draft))

        if closed_form == "none":
            found = [candidate(*each, None, None) for each in unhealed]
        else:
            reach: Reach = "cut" if closed_form == "cut" else "through"
            found = [candidate(*each, part, reach) for each in unhealed]
            best = min(range(len(found)), key=lambda number: found[number].kl)
            part.close()
            found.append(candidate(*unhealed[best], states, reach))
    chosen = min(found, key=lambda each: each.kl)
    chosen.folded.notes = {"candidates": [each.row() for each in found], "chosen": chosen.label}
    return chosen.folded


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
