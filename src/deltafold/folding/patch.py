"""Closed-form patches: what blocks did that are gone is fitted into matrices that stay.

    model    h -> block 3 -> block 4 -> block 5 -> z
    draft    h'-> block 3 ------------> block 5          T of block 3: argmin | r + M T - z' |
                        ^ cut                            z' = what entered block 5 in the model

Patches go from the first cut on, each on the states that the patches before it lead to. `replace-me`
and `replace-me-cosine` fit their paper's matrix T, which follows the MLP's result; `scale`
multiplies the states at the cut, by what is divided after it (`scale.py`). Healing fits changes of
the projections themselves (`heal.py`), or T where experts share a result; `through` also heals
the blocks after a cut, so that errors do not pile up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from deltafold.calibration.probe import is_held
from deltafold.calibration.stream import Pass
from deltafold.errors import MismatchError
from deltafold.folding.by_paper import Kind, Rows, by_paper, check_linear, followed
from deltafold.folding.ends import Mean
from deltafold.folding.heal import Healer
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.healing import (
    Regression,
    patch_scale,
)
from deltafold.folding.scale import check_scaled, scaled_after
from deltafold.folding.states import States
from deltafold.running.engine import Progress, Step

Row = dict[str, Any]
Reach = Literal["cut", "through"]


class Patcher:
    """Patches drafts of one model, whose states over the samples are computed once."""

    def __init__(self, states: States, whole: Draft, progress: Progress | None = None):
        self.progress = progress
        self.states, self.model = states, states.model
        self.layout = whole.layout
        self.original = states.whole(whole)
        self.healer = Healer(states, self.original, whole)
        self.by_projection = self.healer.can_heal("mlp")
        self._factor = 1.0
        """How much larger states should be than they are in the draft, after the cuts seen so far."""

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
        entering = self.model.with_weights(draft.tensor).forward(
            self.states.batches, blocks=numbers[: places[0]]
        )
        try:
            for place in range(places[0], last):
                self._tell(kind, numbers[place], place - places[0], last - places[0])
                leaving = None
                if place in chosen and kind == "heal" and self.by_projection:
                    draft, leaving, made = self.healer.heal(
                        draft, place, follows[place], entering, inner=place > places[0]
                    )
                    rows += made
                elif place in chosen and kind == "scale":
                    draft, leaving, row = self._scale(draft, place, follows[place], entering)
                    rows.append(row)
                elif place in chosen:
                    draft, leaving, row = self._patch(draft, place, follows[place], entering, kind)
                    rows.append(row)
                leaving = leaving or self._run(draft, entering, numbers[place])
                entering.close()
                entering = leaving
        finally:
            entering.close()
        return draft, rows

    def why_nothing(self, rows: Sequence[Row]) -> str:
        """Why healing changed nothing, given its rows."""
        if not rows:
            return "no block stands before a cut"
        if not all(self.healer.ends.known.values()):
            return "what is added to a projection does not reach the hidden states as it is"
        return "no change made the error on held-out samples smaller"

    def _tell(self, kind: Kind, number: int, done: int, total: int) -> None:
        if self.progress:
            self.progress(Step(kind, f"block {number}", float(done), float(total), 0))

    def _run(self, draft: Draft, entering: Pass, number: int) -> Pass:
        return self.model.with_weights(draft.tensor).resume(entering, -1, [number])

    def _patch(
        self, draft: Draft, place: int, target: int, entering: Pass, kind: Kind
    ) -> tuple[Draft, Pass | None, dict[str, Any]]:
        """The patched draft and what leaves the block then.

        A paper's patch is what its formula says, for better or worse; healing that does harm is
        undone. Without a patch nothing is said of what leaves the block. Raises MismatchError where
        a paper's matrix cannot be folded in, since a norm follows the down projection.
        """
        block = draft.blocks[place]
        before = Mean()
        if kind != "heal":
            check_linear(self.model, draft, block.number, entering, kind)
        rows = self._rows(draft, block.number, target, entering, before)
        follow, ridge = self._healed(block, rows) if kind == "heal" else by_paper(list(rows), kind)
        row = {"block": block.number, "kind": kind, "ridge": ridge, "error_before": before.value}
        if follow is None:
            return draft, None, row | {"error_after": before.value, "kept": False}
        tried = draft.with_block(followed(self.layout, block, follow))
        found = self._run(tried, entering, block.number)
        after = self._error(found, target)
        if kind == "heal" and not after < before.value:
            found.close()
            return draft, None, row | {"error_after": before.value, "kept": False}
        return tried, found, row | {"error_after": after, "kept": True}

    def _scale(
        self, draft: Draft, place: int, target: int, entering: Pass
    ) -> tuple[Draft, Pass, dict[str, Any]]:
        """The draft with the states after a cut scaled as LinearPatch's matrix does on the whole."""
        number = draft.blocks[place].number
        leaving = self._run(draft, entering, number)
        found, wanted, held = [], [], []
        for batch_place, batch in enumerate(entering.batches):
            found.append(self._factor * leaving.last[batch_place][batch.real])
            wanted.append(self.original.stores[target][batch_place][batch.real])
            held.append(self._held(batch_place))
        made, goal, at = torch.cat(found), torch.cat(wanted), torch.cat(held)
        scale = patch_scale(made, goal)
        errors = [Mean(), Mean()]
        for error, factor in zip(errors, (1.0, scale), strict=True):
            self._add(error, factor * made, goal, at)
        self._factor *= scale
        row = {"block": number, "kind": "scale", "scale": scale, "kept": True,
               "error_before": errors[0].value, "error_after": errors[1].value}  # fmt: skip
        after = scaled_after(self.healer.ends, draft, place, scale)
        if place + 1 < len(draft):
            check_scaled(self.healer.ends, draft, after, scale, leaving)
        return after, leaving, row

    def _error(self, leaving: Pass, target: int) -> float:
        """Mean of |out - z|^2 / |z|^2 over real tokens: of samples held out, if there are any."""
        mean = Mean()
        for place, batch in enumerate(leaving.batches):
            wanted = self.original.stores[target][place][batch.real]
            self._add(mean, leaving.last[place][batch.real], wanted, self._held(place))
        return mean.value

    def _add(
        self, mean: Mean, found: torch.Tensor, wanted: torch.Tensor, held: torch.Tensor
    ) -> None:
        chosen = held if self._any_held else ~held
        gaps = (found - wanted)[chosen].double().square().sum(1)
        mean.add(gaps / wanted[chosen].double().square().sum(1).clamp_min(1e-30))

    @property
    def _any_held(self) -> bool:
        return any(is_held(n, len(self.states.samples)) for n in range(len(self.states.samples)))

    def _held(self, place: int) -> torch.Tensor:
        """(n,) True for real tokens of samples that are held out."""
        batch = self.states.batches[place]
        held = [is_held(number, len(self.states.samples)) for number in batch.numbers]
        return torch.tensor(held)[:, None].expand(batch.real.shape)[batch.real]

    def _rows(
        self, draft: Draft, number: int, target: int, entering: Pass, error: Mean
    ) -> Iterator[Rows]:
        """Rows by batch, x the MLP's result. Their errors go into `error` on the way."""
        made = self._results(draft, number, entering)
        for place, (x, output) in enumerate(made):
            real = entering.batches[place].real
            wanted, held = self.original.stores[target][place][real], self._held(place)
            self._add(error, output[real], wanted, held)
            yield Rows(x[real], output[real], wanted, held)

    def _results(
        self, draft: Draft, number: int, entering: Pass
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What a block's MLP adds, and the block's output, batch by batch, both (b, t, w)."""
        silent = draft.block(number).without_output(self.layout.mlp_outputs())
        with (
            self._run(draft, entering, number) as whole,
            self._run(draft.with_block(silent), entering, number) as quiet,
        ):
            for place in range(len(entering.batches)):
                yield whole.last[place] - quiet.last[place], whole.last[place]

    def _healed(
        self, block: Block, found: Iterable[Rows]
    ) -> tuple[torch.Tensor | None, float | None]:
        """(T (w, w), its ridge); None where nothing helps, or an MLP was dropped."""
        regression: Regression | None = None
        for rows in found:
            regression = regression or Regression(rows.x.shape[1], rows.output.shape[1])
            scale = 1 / rows.target.norm(dim=1, keepdim=True).clamp_min(1e-15)
            x, y = rows.x * scale, (rows.target - rows.output) * scale
            for held in (False, True):
                chosen = rows.held == held
                regression.add(x[chosen], y[chosen], held)
        assert regression is not None
        matrices = self._matrices()
        if not any(bool(block.read(local).any()) for local in matrices):
            return None, None  # an MLP that was dropped stays so
        fit = regression.fit()
        if fit.ridge is None:
            return None, None
        return torch.eye(len(fit.solution), dtype=torch.float64) + fit.solution, fit.ridge

    def _matrices(self) -> list[str]:
        found = [each for each in self.layout.mlp_outputs() if len(self.layout.shapes[each]) > 1]
        if not found:
            raise MismatchError(
                f"{self.model.checkpoint.label}: no down projection is known by its name, so "
                "nothing can be fitted there; use --closed-form none."
            )
        return found
