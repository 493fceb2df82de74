"""Closed-form patches: what blocks did that are gone is fitted into down projections that stay.

    model    h -> block 3 -> block 4 -> block 5 -> z
    draft    h'-> block 3 ------------> block 5          W of block 3: argmin | out' + x dW - z' |
                        ^ cut                            z' = what entered block 5 in the model

Patches go from the first cut on, each on the states that the patches before it lead to. `replace-me`
and `linear-patch` fit the papers' matrix T, which follows the MLP's result. Healing fits a change of
the down projection itself (of T where experts share a result), by errors relative to each row's
length, with the ridge that does best on samples held out; `through` also heals the blocks after a
cut, so that errors do not pile up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltafold.calibration.stream import Pass, StreamedModel
from deltafold.errors import MismatchError
from deltafold.folding.draft import Block, Draft
from deltafold.folding.healing import (
    Regression,
    folded_in,
    linear_patch,
    replace_me,
)
from deltafold.folding.layout import is_transposed
from deltafold.verbs.fold_states import States, is_held

Reach = Literal["cut", "through"]
Kind = Literal["replace-me", "linear-patch", "heal"]

WIDEST = 8192
"""Down projections with more inputs are healed by T: the sums take the square of the inputs."""
REPLACE_ME_RIDGE = 1e-3
"""lambda of ReplaceMe, as a share of the mean of M'M's diagonal."""


@dataclass
class Rows:
    """What a block does on one batch, real tokens only: all (n, ...)."""

    x: torch.Tensor
    output: torch.Tensor
    target: torch.Tensor
    held: torch.Tensor


class Patcher:
    """Patches drafts of one model; its states over the samples are computed once. Close it."""

    def __init__(self, states: States, whole: Draft):
        self.states, self.model = states, states.model
        self.layout = whole.layout
        self.original = states.run(whole)

    def close(self) -> None:
        """Free states."""
        self.original.close()

    def patched(self, draft: Draft, kind: Kind, reach: Reach = "cut") -> tuple[Draft, list[Any]]:
        """(the draft with its patches, what each was worth)."""
        numbers = draft.numbers
        follows = [*numbers[1:], self.layout.depth]
        cuts = [p for p, number in enumerate(numbers) if follows[p] != number + 1]
        changed = [p for p, block in enumerate(draft.blocks) if block.changed]
        places = sorted({*cuts, *(changed if kind == "heal" else [])})
        if not places:
            return draft, []
        last = len(numbers) if reach == "through" else places[-1] + 1
        chosen = range(places[0], last) if reach == "through" else places
        rows = []
        model = self.model.with_weights(draft.tensor)
        entering = model.forward(self.states.batches, blocks=numbers[: places[0]])
        try:
            for place in range(places[0], last):
                leaving = self._run(draft, entering, numbers[place])
                if place in chosen:
                    target = follows[place]
                    draft, leaving, row = self._patch(draft, place, target, entering, leaving, kind)
                    rows.append(row)
                entering.close()
                entering = leaving
        finally:
            entering.close()
        return draft, rows

    def _run(self, draft: Draft, entering: Pass, number: int) -> Pass:
        return self.model.with_weights(draft.tensor).resume(entering, -1, [number])

    def _patch(
        self, draft: Draft, place: int, target: int, entering: Pass, leaving: Pass, kind: Kind
    ) -> tuple[Draft, Pass, dict[str, Any]]:
        """The patched draft and what leaves the block then. A patch that does harm is undone.

        That happens where a norm follows the down projection: then no matrix can be folded in.
        """
        block = draft.blocks[place]
        before = self._error(leaving, target)
        made, ridge = (
            self._healed(draft, block, target, entering, leaving)
            if kind == "heal"
            else self._by_paper(draft, block, target, entering, leaving, kind)
        )
        row = {"block": block.number, "kind": kind, "ridge": ridge, "error_before": before}
        if made is block:
            return draft, leaving, row | {"error_after": before, "kept": False}
        tried = draft.with_block(made)
        found = self._run(tried, entering, block.number)
        after = self._error(found, target)
        if not after < before and kind != "linear-patch":
            found.close()
            return draft, leaving, row | {"error_after": before, "kept": False}
        leaving.close()
        return tried, found, row | {"error_after": after, "kept": True}

    def _error(self, leaving: Pass, target: int) -> float:
        """Mean of |out - z|^2 / |z|^2 over real tokens: of samples held out, if there are any."""
        total, count = 0.0, 0
        for place in range(len(leaving.batches)):
            held = self._held(place)
            wanted = self.original.stores[target][place][leaving.batches[place].real]
            found = leaving.last[place][leaving.batches[place].real]
            if held.any():
                wanted, found = wanted[held], found[held]
            elif self._any_held:
                continue
            gaps = (found - wanted).double().square().sum(1)
            total += float((gaps / wanted.double().square().sum(1).clamp_min(1e-30)).sum())
            count += len(wanted)
        return total / max(1, count)

    @property
    def _any_held(self) -> bool:
        return any(is_held(n, len(self.states.samples)) for n in range(len(self.states.samples)))

    def _held(self, place: int) -> torch.Tensor:
        """(n,) True for real tokens of samples that are held out."""
        batch = self.states.batches[place]
        held = [is_held(number, len(self.states.samples)) for number in batch.numbers]
        return torch.tensor(held)[:, None].expand(batch.real.shape)[batch.real]

    def _rows(
        self, draft: Draft, number: int, target: int, entering: Pass, leaving: Pass, inputs: bool
    ) -> Any:
        """Rows by batch: x are the down projection's inputs, or else the MLP's result."""
        block = draft.block(number)
        if inputs:
            caught = _caught(self.model.with_weights(draft.tensor), entering, number,
                             self._module(number))  # fmt: skip
        else:
            silent = draft.with_block(block.without_output(self.layout.mlp_outputs()))
            quiet = self._run(silent, entering, number)
        for place, batch in enumerate(entering.batches):
            output = leaving.last[place][batch.real]
            x = next(caught)[batch.real] if inputs else output - quiet.last[place][batch.real]
            yield Rows(x, output, self.original.stores[target][place][batch.real],
                       self._held(place))  # fmt: skip
        if not inputs:
            quiet.close()

    def _healed(
        self, draft: Draft, block: Block, target: int, entering: Pass, leaving: Pass
    ) -> tuple[Block, float | None]:
        if not any(bool(block.read(local).any()) for local in self._matrices()):
            return block, None  # an MLP that was dropped stays so
        inputs = self._module(block.number) is not None
        regression: Regression | None = None
        for rows in self._rows(draft, block.number, target, entering, leaving, inputs):
            regression = regression or Regression(rows.x.shape[1], rows.output.shape[1])
            scale = 1 / rows.target.double().norm(dim=1, keepdim=True).clamp_min(1e-15)
            x, y = rows.x * scale, (rows.target - rows.output) * scale
            for held in (False, True):
                chosen = rows.held == held
                regression.add(x[chosen], y[chosen], held)
        assert regression is not None
        fit = regression.fit()
        if fit.ridge is None:
            return block, None
        if not inputs:
            eye = torch.eye(len(fit.solution), dtype=torch.float64)
            return self._followed(block, eye + fit.solution), fit.ridge
        (local,) = self._matrices()
        weight = block.read(local)
        transposed = is_transposed(tuple(weight.shape), fit.solution.shape[1])
        change = fit.solution if transposed else fit.solution.T
        return block.with_tensor(local, (weight.double() + change).float()), fit.ridge

    def _by_paper(
        self, draft: Draft, block: Block, target: int, entering: Pass, leaving: Pass, kind: Kind
    ) -> tuple[Block, float | None]:
        parts = list(self._rows(draft, block.number, target, entering, leaving, inputs=False))
        made, output, wanted = (
            torch.cat([getattr(each, name) for each in parts]) for name in ("x", "output", "target")
        )
        if kind == "linear-patch":
            wanted = (output.double() @ linear_patch(output, wanted)).float()
        size = float((made.double() ** 2).sum() / made.shape[1])
        follow = replace_me(made, output, wanted, REPLACE_ME_RIDGE * size)
        return self._followed(block, follow), REPLACE_ME_RIDGE

    def _followed(self, block: Block, follow: torch.Tensor) -> Block:
        """The block with a matrix T (w, w) after its MLP: folded into all its down projections."""
        outputs = {
            local: folded_in(
                block.read(local), follow, is_transposed(self.layout.shapes[local], len(follow))
            )
            for local in self.layout.mlp_outputs()
        }
        return block.with_tensors(
            lambda local: outputs[local] if local in outputs else block.read(local)
        )

    def _matrices(self) -> list[str]:
        return [each for each in self.layout.mlp_outputs() if len(self.layout.shapes[each]) > 1]

    def _module(self, number: int) -> Any:
        """The one module that is the block's down projection; None where there are several."""
        found = self._matrices()
        if not found:
            raise MismatchError(
                f"{self.model.checkpoint.label}: no down projection is known by its name in "
                f"block {number}, so nothing can be fitted there; use --no-heal."
            )
        if len(found) > 1 or max(self.layout.shapes[found[0]]) > WIDEST:
            return None
        skeleton = self.model.skeleton
        for name in skeleton.block(number):
            group = skeleton.groups.get(name)
            if (
                group
                and group.converter is None
                and group.names == (self.layout.name(number, found[0]),)
            ):
                return skeleton.model.get_submodule(name.rpartition(".")[0])
        return None


def _caught(model: StreamedModel, entering: Pass, number: int, module: Any) -> Any:
    """Inputs (b, t, i) of a module of a block, batch by batch."""
    caught: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: caught.append(given[0].detach()))
    block = model.skeleton.blocks[number]
    try:
        with torch.no_grad(), model.skeleton.filled(model.skeleton.block(number), model.weights):
            for place in range(len(entering.batches)):
                with model.entry.sentence():
                    hidden = model.moved(entering.last[place])
                    entering.calls[place][number].run(block, hidden)
                yield caught.pop().cpu()
    finally:
        hook.remove()
