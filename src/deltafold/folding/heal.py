"""Healing: the projections that write into the stream take over what removed blocks did.

    model    h -> block 3 -> block 4 -> block 5 -> block 6 -> z
    draft    h'-> block 3 ------------> block 5 -> block 6
                  down                  out, down  out, down

Block by block from the first cut on, each on the states that the healing before it leads to: first
the attention's output projection, towards the states inside the block as the model has them, then
the down projection, towards what leaves the block. At a cut that is what the last removed block
left. A change is least squares by errors relative to each row's length, with the ridge that does
best on samples held out. It is refused where it does not help on these. Where a norm stands between
the projection and the stream (Gemma 2 and 3, OLMo 2), adding to one does not add to the other: there
the norm's gains are fitted too, and the projection through the norm (`methods/normed.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from deltafold.blocks.layout import is_transposed
from deltafold.calibration.stream import Pass
from deltafold.folding.ends import SAME, Ends, Mean, Part
from deltafold.folding.heal_normed import heal_through_norm
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.healing import Fit, Regression
from deltafold.folding.states import States
from deltafold.folding.watching import At


class Healer:
    """Heals drafts of one model, whose states over the samples are `original`."""

    def __init__(self, states: States, original: Pass, whole: Draft):
        self.original, self.whole, self.model = original, whole, states.model
        self.ends = Ends(states, original, whole)

    def can_heal(self, part: Part) -> bool:
        """True if the projection that ends this part is one matrix, known by its name."""
        return self.ends.can_heal(part)

    def heal(
        self, draft: Draft, place: int, target: int, entering: Pass, inner: bool
    ) -> tuple[Draft, Pass, list[dict[str, Any]]]:
        """(the draft with the block at `place` healed, what leaves it then, rows for the record).

        `target` is the model's block that what leaves shall enter; `inner` heals the attention too.
        """
        rows = []
        if inner and self.can_heal("attention"):
            draft, row = self._attention(draft, place, entering)
            rows.append(row)
        draft, leaving, row = self._mlp(draft, place, target, entering)
        return draft, leaving, [*rows, row]

    def _attention(self, draft: Draft, place: int, entering: Pass) -> tuple[Draft, dict[str, Any]]:
        """The states after the attention, h + a, towards the model's own in the same block."""
        block, local = draft.blocks[place], self.ends.matrix("attention")
        assert local is not None
        with self.ends.store() as wanted:
            source = At(self.original, block.number)
            for number, seen in enumerate(
                self.ends.seen(self.whole, block.number, local, source, True)
            ):
                wanted[number] = source.states(number) + seen.results[-1]
            if local in self.ends.norms.after:
                healed, row, _ = heal_through_norm(
                    self.ends, draft, place, "attention", entering, wanted
                )
                return healed, row
            regression, before = None, Mean()
            walk = self.ends.seen(draft, block.number, local, At(entering, -1), True)
            for number, seen in enumerate(walk):
                found = entering.last[number] + seen.results[0]
                regression = self._learn(
                    regression, number, seen.inputs[0], found, wanted[number], before
                )
        assert regression is not None
        fit = regression.fit()
        row = {"block": block.number, "part": "attention", "kind": "heal", "ridge": fit.ridge,
               "error_before": before.value}  # fmt: skip
        made = self._changed(block, local, fit)
        if made is block or not self._adds(draft, block, made, "attention", fit, entering):
            return draft, row | {"error_after": before.value, "kept": False}
        return draft.with_block(made), row | {
            "error_after": before.value * fit.after / max(fit.before, 1e-300), "kept": True
        }  # fmt: skip

    def _mlp(
        self, draft: Draft, place: int, target: int, entering: Pass
    ) -> tuple[Draft, Pass, dict[str, Any]]:
        """What leaves the block towards what enters the model's block `target`."""
        block, local = draft.blocks[place], self.ends.matrix("mlp")
        assert local is not None
        if local in self.ends.norms.after:
            healed, row, left = heal_through_norm(
                self.ends, draft, place, "mlp", entering, self.original.stores[target]
            )
            assert left is not None
            return healed, left, row
        leaving = Pass(entering.batches, entering.calls, [self.model.store_beside(entering)])
        regression, before = None, Mean()
        with self.ends.store(local) as inputs:
            walk = self.ends.seen(draft, block.number, local, At(entering, -1), False)
            for number, seen in enumerate(walk):
                assert seen.output is not None
                leaving.last[number], inputs[number] = seen.output, seen.inputs[0]
                wanted = self.original.stores[target][number]
                regression = self._learn(
                    regression, number, seen.inputs[0], seen.output, wanted, before
                )
            assert regression is not None
            fit = regression.fit()
            row = {"block": block.number, "part": "mlp", "kind": "heal", "ridge": fit.ridge,
                   "error_before": before.value}  # fmt: skip
            made = self._changed(block, local, fit)
            if made is block or not self._adds(draft, block, made, "mlp", fit, entering):
                return draft, leaving, row | {"error_after": before.value, "kept": False}
            for number in range(len(entering.batches)):
                leaving.last[number] = leaving.last[number] + inputs[number] @ fit.solution.float()
        after = before.value * fit.after / max(fit.before, 1e-300)
        return draft.with_block(made), leaving, row | {"error_after": after, "kept": True}

    def _learn(
        self,
        regression: Regression | None,
        number: int,
        inputs: torch.Tensor,
        found: torch.Tensor,
        wanted: torch.Tensor,
        error: Mean,
    ) -> Regression:
        """Take one batch's real tokens into the sums, each row relative to its target's length."""
        real, held = self.original.batches[number].real, self.ends.is_held(number)
        x, gap, goal = inputs[real], (wanted - found)[real], wanted[real]
        scale = 1 / goal.norm(dim=1, keepdim=True).clamp_min(1e-15)
        x, y = x * scale, gap * scale
        regression = regression or Regression(x.shape[1], y.shape[1])
        for each in (False, True):
            chosen = held == each
            regression.add(x[chosen], y[chosen], each, self.model.mixed)
        error.add(y[held if any(self.ends.held) else ~held].double().square().sum(1))
        return regression

    def _changed(self, block: Block, local: str, fit: Fit) -> Block:
        """The block with the fitted change; the same block where there is none to make."""
        weight = block.read(local)
        if fit.ridge is None or not bool(weight.any()):  # a sub-layer that was dropped stays so
            return block
        width = fit.solution.shape[1]
        change = fit.solution if is_transposed(tuple(weight.shape), width) else fit.solution.T
        return block.with_tensor(local, (weight.double() + change).float())

    def _adds(
        self, draft: Draft, block: Block, made: Block, part: Part, fit: Fit, entering: Pass
    ) -> bool:
        """True if the stream gets what is added to the projection, tried on the first batch.

        Blocks are alike, so what was found of one is taken for the others.
        """
        local = self.ends.matrix(part)
        assert local is not None
        if local not in self.ends.known:
            one, two = self.ends.pair(draft, block, made, part, entering)
            assert one.output is not None and two.output is not None
            real = entering.batches[0].real
            added = (one.inputs[0] @ fit.solution.float())[real]
            gap = (two.output - one.output)[real] - added
            self.ends.known[local] = float(gap.norm()) <= SAME * max(
                float(added.norm()), SAME * float(one.output[real].norm())
            )
        return self.ends.known[local]
