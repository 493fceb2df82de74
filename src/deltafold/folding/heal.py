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

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltafold.blocks.layout import is_transposed
from deltafold.calibration.probe import is_held
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.healing import Fit, Regression
from deltafold.folding.methods.normed import Ending, Rows, heal_normed
from deltafold.folding.methods.norms import Norm
from deltafold.folding.states import States
from deltafold.folding.watching import At, Norms, Seen, find_norms, module_of, run_norm, watched

Part = Literal["attention", "mlp"]

WIDEST = 8192
"""A projection with more inputs is left alone: the sums take the square of the inputs."""
SAME = 1e-3
"""Relative difference of an output from its prediction, above which a projection is not linear."""


class Healer:
    """Heals drafts of one model, whose states over the samples are `original`."""

    def __init__(self, states: States, original: Pass, whole: Draft):
        self.original, self.whole = original, whole
        self.model, self.layout = states.model, whole.layout
        self.held = [is_held(n, len(states.samples)) for n in range(len(states.samples))]
        self._linear: dict[str, bool] = {}

    @functools.cached_property
    def norms(self) -> Norms:
        """The norms beside the matrices of a block; blocks are alike, so those of the first."""
        return find_norms(self.model.exact().with_weights(self.whole.tensor), self.layout, 0,
                          At(self.original, 0))  # fmt: skip

    def can_heal(self, part: Part) -> bool:
        """True if the projection that ends this part is one matrix, known by its name."""
        found = self._matrix(part)
        return found is not None and self._module(0, found) is not None

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
        block, local = draft.blocks[place], self._matrix("attention")
        assert local is not None
        with self._store() as wanted:
            source = At(self.original, block.number)
            for number, seen in enumerate(
                self._seen(self.whole, block.number, local, source, True)
            ):
                wanted[number] = source.states(number) + seen.results[-1]
            if local in self.norms.after:
                made_draft, row, _ = self._normed(draft, place, "attention", entering, wanted)
                return made_draft, row
            regression, before = None, Mean()
            walk = self._seen(draft, block.number, local, At(entering, -1), True)
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
        if made is block or not self._adds(draft, block, made, local, fit, entering):
            return draft, row | {"error_after": before.value, "kept": False}
        return draft.with_block(made), row | {
            "error_after": before.value * fit.after / max(fit.before, 1e-300), "kept": True
        }  # fmt: skip

    def _mlp(
        self, draft: Draft, place: int, target: int, entering: Pass
    ) -> tuple[Draft, Pass, dict[str, Any]]:
        """What leaves the block towards what enters the model's block `target`."""
        block, local = draft.blocks[place], self._matrix("mlp")
        assert local is not None
        if local in self.norms.after:
            made_draft, row, left = self._normed(
                draft, place, "mlp", entering, self.original.stores[target]
            )
            assert left is not None
            return made_draft, left, row
        leaving = Pass(entering.batches, entering.calls, [self.model.store_beside(entering)])
        regression, before = None, Mean()
        with self._store(local) as inputs:
            walk = self._seen(draft, block.number, local, At(entering, -1), False)
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
            if made is block or not self._adds(draft, block, made, local, fit, entering):
                return draft, leaving, row | {"error_after": before.value, "kept": False}
            for number in range(len(entering.batches)):
                leaving.last[number] = leaving.last[number] + inputs[number] @ fit.solution.float()
        after = before.value * fit.after / max(fit.before, 1e-300)
        return draft.with_block(made), leaving, row | {"error_after": after, "kept": True}

    def _normed(
        self, draft: Draft, place: int, part: Part, entering: Pass, wanted: TensorStore
    ) -> tuple[Draft, dict[str, Any], Pass | None]:
        """A part that a norm ends: (the draft healed, the row, what leaves the block, for an MLP)."""
        block, local = draft.blocks[place], self._matrix(part)
        assert local is not None
        norm, weight = self.norms.after[local], block.read(local).float()
        turned = not is_transposed(tuple(weight.shape), entering.last.shapes[0][-1])
        gain = norm.gain(block.read).float()
        ending = Ending(weight.T if turned else weight, gain, self._normaliser(norm))
        row = {"block": block.number, "part": part, "kind": "heal", "norm": True}
        with self._store(local) as inputs, self._store() as stream:
            outputs = None if part == "attention" else self.model.store_beside(entering)
            walk = self._seen(draft, block.number, local, At(entering, -1), part == "attention")
            for number, seen in enumerate(walk):
                inputs[number] = seen.inputs[0]
                stream[number] = entering.last[number]
                if seen.output is not None and outputs is not None:
                    stream[number] = seen.output - seen.results[-1]
                    outputs[number] = seen.output

            def rows() -> Iterator[Rows]:
                for number, batch in enumerate(entering.batches):
                    real = batch.real
                    yield Rows(inputs[number][real], stream[number][real], wanted[number][real],
                               self._held(number))  # fmt: skip

            healed, before, after, ridge = heal_normed(ending, rows)
            made = block
            if after < before and bool(weight.any()):  # a sub-layer that was dropped stays so
                new = healed.weight.T if turned else healed.weight
                made = block.with_tensor(local, new.contiguous())
                made = made.with_tensor(norm.weight, healed.gain - norm.offset)
            leaving = outputs and Pass(entering.batches, entering.calls, [outputs])
            if made is block or not self._follows(draft, block, made, part, entering):
                row |= {"ridge": None, "error_before": before, "error_after": before, "kept": False}
                return draft, row, leaving
            for number in range(len(entering.batches)):
                if leaving is not None:
                    added = healed.gain * healed.result(inputs[number])[1]
                    leaving.last[number] = stream[number] + added
        row |= {"ridge": ridge, "error_before": before, "error_after": after, "kept": True}
        return draft.with_block(made), row, leaving

    def _normaliser(self, norm: Norm) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the norm does to states (n, w) or (b, t, w) before its gains."""
        module = self._module(0, norm.weight)
        return lambda states: run_norm(module, 1.0 - norm.offset, norm.bias is not None, states)

    def _follows(self, draft: Draft, block: Block, made: Block, part: Part, entering: Pass) -> bool:
        """True if the stream gets what the norm after a part makes, tried on the first batch."""
        local = self._matrix(part)
        assert local is not None
        if local not in self._linear:
            if part == "attention":
                silent = self.layout.mlp_outputs()
                block, made = block.without_output(silent), made.without_output(silent)
            one, two = (self._first(draft.with_block(each), each.number, local, entering)
                        for each in (block, made))  # fmt: skip
            assert one.output is not None and two.output is not None
            real = entering.batches[0].real
            added = (two.results[-1] - one.results[-1])[real]
            gap = (two.output - one.output)[real] - added
            self._linear[local] = float(gap.norm()) <= SAME * float(added.norm())
        return self._linear[local]

    def _store(self, local: str | None = None) -> TensorStore:
        """A store for the inputs of a projection, or for states inside a block."""
        wide = width = self.original.last.shapes[0][-1]
        if local is not None:
            shape = self.layout.shapes[local]
            wide = shape[-1] if shape[-2] == width else shape[-2]
        shapes = [(*batch.ids.shape, wide) for batch in self.original.batches]
        held = sum(store.held_bytes for store in self.original.stores)
        return TensorStore(shapes, self.model.memory_bytes - held, self.model.scratch)

    def _ends(self, number: int, local: str) -> list[Any]:
        """The modules that end a part: its projection, and the norm after it where there is one."""
        norm = self.norms.after.get(local)
        names = [local] if norm is None else [local, norm.weight]
        return [self._module(number, each) for each in names]

    def _seen(
        self, draft: Draft, number: int, local: str, source: At, only_attention: bool
    ) -> Generator[Seen]:
        """A block of a draft at work, batch by batch, seen at what ends a part."""
        yield from watched(
            self.model.with_weights(draft.tensor), number, self._ends(number, local), source,
            only_attention,
        )  # fmt: skip

    def _first(self, draft: Draft, number: int, local: str, entering: Pass) -> Seen:
        """What is seen on the first batch, computed in full precision."""
        model = self.model.exact().with_weights(draft.tensor)
        walk = watched(model, number, self._ends(number, local), At(entering, -1))
        with contextlib.closing(walk):
            return next(walk)

    def _held(self, number: int) -> torch.Tensor:
        """(n,) True for a batch's real tokens of samples that are held out."""
        batch = self.original.batches[number]
        held = torch.tensor([self.held[n] for n in batch.numbers])
        return held[:, None].expand(batch.real.shape)[batch.real]

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
        real, held = self.original.batches[number].real, self._held(number)
        x, gap, goal = inputs[real], (wanted - found)[real], wanted[real]
        scale = 1 / goal.norm(dim=1, keepdim=True).clamp_min(1e-15)
        x, y = x * scale, gap * scale
        regression = regression or Regression(x.shape[1], y.shape[1])
        for each in (False, True):
            chosen = held == each
            regression.add(x[chosen], y[chosen], each, self.model.mixed)
        error.add(y[held if any(self.held) else ~held].double().square().sum(1))
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
        self, draft: Draft, block: Block, made: Block, local: str, fit: Fit, entering: Pass
    ) -> bool:
        """True if the stream gets what is added to the projection, tried on the first batch.

        Blocks are alike, so what was found of one is taken for the others.
        """
        if local not in self._linear:
            self._linear[local] = self._tried(draft, block, made, local, fit, entering)
        return self._linear[local]

    def _tried(
        self, draft: Draft, block: Block, made: Block, local: str, fit: Fit, entering: Pass
    ) -> bool:
        part = "attention" if local == self._matrix("attention") else "mlp"
        if part == "attention":
            # What is added there reaches the block's output by other ways too; so the MLP is silent.
            silent = self.layout.mlp_outputs()
            block, made = block.without_output(silent), made.without_output(silent)
        one, two = (self._first(draft.with_block(each), each.number, local, entering)
                    for each in (block, made))  # fmt: skip
        assert one.output is not None and two.output is not None
        real = entering.batches[0].real
        added = (one.inputs[0] @ fit.solution.float())[real]
        gap = (two.output - one.output)[real] - added
        return float(gap.norm()) <= SAME * max(
            float(added.norm()), SAME * float(one.output[real].norm())
        )

    def _matrix(self, part: Part) -> str | None:
        """Local name of the one matrix that ends a part; None where there are several, or none."""
        names = (
            self.layout.attention_outputs() if part == "attention" else self.layout.mlp_outputs()
        )
        found = [each for each in names if len(self.layout.shapes[each]) > 1]
        if len(found) != 1 or max(self.layout.shapes[found[0]]) > WIDEST:
            return None
        return found[0] if len(self.layout.shapes[found[0]]) == 2 else None

    def _module(self, number: int, local: str) -> Any:
        """The module that holds a block's matrix; None where the model keeps it in another form."""
        return module_of(self.model, self.layout, number, local)


@dataclass
class Mean:
    """The mean of what is added."""

    total: float = 0.0
    count: int = 0

    def add(self, values: torch.Tensor) -> None:
        """Take more values (n,) into the mean."""
        self.total, self.count = self.total + float(values.sum()), self.count + len(values)

    @property
    def value(self) -> float:
        return self.total / max(1, self.count)
