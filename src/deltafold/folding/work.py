"""The folding itself: evidence, choice, rule, until enough blocks have gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deltafold.calibration.probe import Probe
from deltafold.coding.counter import derive_key
from deltafold.errors import MismatchError
from deltafold.folding.evidence import DraftEvidence, placed
from deltafold.folding.job import FoldJob
from deltafold.folding.methods.draft import Draft, Shown
from deltafold.folding.methods.mka import reference_ratio
from deltafold.folding.methods.selection import Step
from deltafold.folding.methods.similarity import SIMILARITIES
from deltafold.folding.request import FoldRequest
from deltafold.folding.states import States
from deltafold.running.engine import Step as ProgressStep

Row = dict[str, Any]
HALF = 0.5


@dataclass
class Folded:
    """What came of it. `steps` are rows for the record, in order; `silenced` sub-layers stay as zeros.

    `unhealed` is the draft before patches, where there are any.

    `matrices` holds the similarity matrix of each iteration with the blocks it speaks of.
    """

    draft: Draft
    steps: list[Row] = field(default_factory=list)
    patches: list[Row] = field(default_factory=list)
    matrices: list[tuple[list[int], torch.Tensor]] = field(default_factory=list)
    silenced: list[tuple[int, str]] = field(default_factory=list)
    unhealed: Draft | None = None
    notes: Row = field(default_factory=dict)


class BlockFolder:
    """Carries out a job on a model; `states` and `probe` run text where the method needs it."""

    def __init__(
        self,
        job: FoldJob,
        states: States | None,
        probe: Callable[[], Probe],
        request: FoldRequest,
    ):
        self.job, self.states, self.probe, self.request = job, states, probe, request

    def fold(self, whole: Draft, count: int | None = None) -> Folded:
        """Fold until `count` blocks have gone. Raises MismatchError where no choice is left."""
        done = Folded(whole)
        wanted = len(whole) - (self.job.count if count is None else count)
        while len(done.draft) > wanted:
            left = len(done.draft) - wanted
            self._round(done, left)
            self._tell(whole, len(whole) - len(done.draft), len(whole) - wanted)
            if self.job.is_joint:
                return done
            if len(done.draft) - wanted == left:
                raise MismatchError(
                    f"{self.job.method.name} finds no {left} more blocks that may go; protect fewer, "
                    "or ask for fewer."
                )
        return done

    def _round(self, done: Folded, left: int) -> None:
        """Gather evidence, choose, carry out."""
        draft = done.draft
        places = [p for p, number in enumerate(draft.numbers) if number in self.job.protected]
        evidence = DraftEvidence(
            draft,
            self.job.method,
            frozenset(places),
            derive_key(self.request.seed, "fold"),
            self.states,
            self.probe,
            lambda base, step: self._carried(base, step, HALF),
            self.request.pool,
        )
        try:
            chosen = self.job.method.chooser.choose(evidence, left)
            if self.job.method.uses_matrix:
                evidence.alike()
            shown = self._shown(evidence, chosen)
            ratios = [self._ratio(evidence, step, shown) for step in chosen]
        finally:
            evidence.close()
        if evidence.has_matrix:
            done.matrices.append((draft.numbers, evidence.alike()))
        if self.job.is_joint:
            self._silence(done, self._enough(chosen))
            return
        for step, ratio in zip(chosen, ratios, strict=True):
            done.steps.append(self._row(draft, step, ratio))
            now = placed(draft, done.draft, step)
            done.draft = self._carried(_with_shown(done.draft, shown), now, ratio)

    def _carried(self, draft: Draft, step: Step, ratio: float) -> Draft:
        """The draft after a step: what goes is blended into what is kept."""
        gone = [draft.blocks[place] for place in step.gone]
        if step.keep is not None:
            kept = draft.blocks[step.keep]
            blended = self.job.method.rule.blend(kept, gone, ratio, self.job.units)
            draft = draft.with_block(blended)
        return draft.without([block.number for block in gone])

    def _shown(self, evidence: DraftEvidence, chosen: list[Step]) -> dict[int, Shown]:
        """What text shows of the blocks that are merged, by number; for rules that look at it."""
        if not self.job.method.rule.looks:
            return {}
        places = {p for step in chosen if step.keep is not None for p in (step.keep, *step.gone)}
        numbers = evidence.draft.numbers
        return {numbers[place]: evidence.shown(place, self.job.units) for place in sorted(places)}

    def _ratio(self, evidence: DraftEvidence, step: Step, shown: Mapping[int, Shown]) -> float:
        """The kept block's share: by influence, by the similarity of the outputs, as the program has
        it, or half.
        """
        preset = self.job.method.preset
        if not self.job.method.rule.merges or step.keep is None:
            return 1.0
        if shown:
            numbers = evidence.draft.numbers
            found = [shown[numbers[place]].influence for place in (step.keep, *step.gone)]
            return found[0] / sum(found) if sum(found) else 1 / len(found)
        if not evidence.has_matrix:
            return HALF
        if preset.ratio == "reference":
            return reference_ratio(evidence.alike(), step.keep + 1, step.gone[-1] + 1)
        if not SIMILARITIES[preset.similarity].ratio:
            return HALF
        return min(1.0, max(0.0, float(evidence.alike()[step.keep + 1, step.gone[-1] + 1])))

    def _row(self, draft: Draft, step: Step, ratio: float) -> Row:
        numbers, rule = draft.numbers, self.job.method.rule
        return {
            "kept": None if step.keep is None else numbers[step.keep],
            "gone": [numbers[place] for place in step.gone],
            "ratio": ratio if (rule.weighs or rule.looks) and step.keep is not None else None,
            "score": step.score,
            **({} if step.threshold is None else {"threshold": step.threshold}),
        }

    def _enough(self, ranked: list[Step]) -> list[Step]:
        """The first sub-layers of a ranking that hold the goal's parameters; all where there is none."""
        held, enough = 0, []
        for step in ranked:
            if self.job.goal and held >= self.job.goal:
                break
            enough.append(step)
            held += self.job.layout.part_parameters(str(step.part))
        return enough

    def _silence(self, done: Folded, chosen: list[Step]) -> None:
        """Sub-layers that go: their output projections become zero; a block that loses both goes."""
        layout = self.job.layout
        outputs = {"attention": layout.attention_outputs(), "mlp": layout.mlp_outputs()}
        lost: dict[int, list[str]] = {}
        for step in chosen:
            number = done.draft.numbers[step.gone[0]]
            lost.setdefault(number, []).append(str(step.part))
            done.steps.append(
                {"kept": None, "gone": [number], "part": step.part, "ratio": None,
                 "score": step.score}
            )  # fmt: skip
        for number, parts in lost.items():
            block = done.draft.block(number)
            for part in parts:
                block = block.without_output(outputs[part])
            done.draft = done.draft.with_block(block)
            if len(parts) == 1:
                done.silenced.append((number, parts[0]))
        both = [number for number, parts in lost.items() if len(parts) == 2]
        done.draft = done.draft.without(both)

    def _tell(self, whole: Draft, done: int, total: int) -> None:
        if self.request.progress:
            self.request.progress(
                ProgressStep("fold", f"{done} of {total} blocks", float(done), float(total), 0)
            )


def _with_shown(draft: Draft, shown: Mapping[int, Shown]) -> Draft:
    """The draft whose blocks know what text showed of them."""
    blocks = (b.with_shown(shown[b.number]) if b.number in shown else b for b in draft.blocks)
    return replace(draft, blocks=tuple(blocks))
