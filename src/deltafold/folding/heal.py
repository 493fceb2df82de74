"""Healing: the projections that write into the stream take over what removed blocks did.

    model    h -> block 3 -> block 4 -> block 5 -> block 6 -> z
    draft    h'-> block 3 ------------> block 5 -> block 6
                  down                  out, down  out, down

Block by block from the first cut on, each on the states that the healing before it leads to: first
the attention's output projection, towards the states inside the block as the model has them, then
the down projection, towards what leaves the block. At a cut that is what the last removed block
left. A change is least squares by errors relative to each row's length, with the ridge that does
best on samples held out. It is refused where it does not help on these, and where a norm stands
between the projection and the stream, so that adding to one does not add to the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltafold.blocks.layout import is_transposed
from deltafold.calibration.probe import is_held
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass, StreamedModel
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.healing import Fit, Regression
from deltafold.folding.states import States

Part = Literal["attention", "mlp"]

WIDEST = 8192
"""A projection with more inputs is left alone: the sums take the square of the inputs."""
SAME = 1e-3
"""Relative difference of an output from its prediction, above which a projection is not linear."""


class _Enough(BaseException):
    """Ends a block's forward once the attention has been seen."""


@dataclass
class Seen:
    """One batch at a projection: its inputs (b, t, i), its result and the block's output (b, t, w)."""

    inputs: torch.Tensor
    result: torch.Tensor
    output: torch.Tensor | None


class Healer:
    """Heals drafts of one model, whose states over the samples are `original`."""

    def __init__(self, states: States, original: Pass, whole: Draft):
        self.original, self.whole = original, whole
        self.model, self.layout = states.model, whole.layout
        self.held = [is_held(n, len(states.samples)) for n in range(len(states.samples))]
        self._linear: dict[str, bool] = {}

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
        with self._store("result") as wanted:
            source = _At(self.original, block.number)
            for number, seen in enumerate(
                self._seen(self.whole, block.number, local, source, True)
            ):
                wanted[number] = source.states(number) + seen.result
            regression, before = None, Mean()
            walk = self._seen(draft, block.number, local, _At(entering, -1), True)
            for number, seen in enumerate(walk):
                found = entering.last[number] + seen.result
                regression = self._learn(
                    regression, number, seen.inputs, found, wanted[number], before
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
        leaving = Pass(entering.batches, entering.calls, [self.model.store_beside(entering)])
        regression, before = None, Mean()
        with self._store("inputs") as inputs:
            walk = self._seen(draft, block.number, local, _At(entering, -1), False)
            for number, seen in enumerate(walk):
                assert seen.output is not None
                leaving.last[number], inputs[number] = seen.output, seen.inputs
                wanted = self.original.stores[target][number]
                regression = self._learn(
                    regression, number, seen.inputs, seen.output, wanted, before
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

    def _store(self, what: Literal["result", "inputs"]) -> TensorStore:
        """A store for a projection's inputs, or for states inside a block."""
        local = self._matrix("mlp")
        assert local is not None
        shape = self.layout.shapes[local]
        width = self.original.last.shapes[0][-1]
        wide = width if what == "result" else shape[-1] if shape[-2] == width else shape[-2]
        shapes = [(*batch.ids.shape, wide) for batch in self.original.batches]
        held = sum(store.held_bytes for store in self.original.stores)
        return TensorStore(shapes, self.model.memory_bytes - held, self.model.scratch)

    def _seen(
        self, draft: Draft, number: int, local: str, source: _At, only_attention: bool
    ) -> Generator[Seen]:
        """A block of a draft at work, batch by batch, seen at one projection."""
        module = self._module(number, local)
        yield from _watched(
            self.model.with_weights(draft.tensor), number, module, source, only_attention
        )

    def _first(self, draft: Draft, number: int, local: str, entering: Pass) -> Seen:
        """What is seen on the first batch, computed in full precision."""
        model = self.model.exact().with_weights(draft.tensor)
        walk = _watched(model, number, self._module(number, local), _At(entering, -1), False)
        with contextlib.closing(walk):
            return next(walk)

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
        batch = self.original.batches[number]
        real = batch.real
        x, gap, goal = inputs[real], (wanted - found)[real], wanted[real]
        held = torch.tensor([self.held[n] for n in batch.numbers])[:, None].expand(real.shape)[real]
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
        added = (one.inputs @ fit.solution.float())[real]
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
        skeleton = self.model.skeleton
        for name in skeleton.block(number):
            group = skeleton.groups.get(name)
            if (
                group
                and group.converter is None
                and group.names == (self.layout.name(number, local),)
            ):
                return skeleton.model.get_submodule(name.rpartition(".")[0])
        return None


@dataclass
class _At:
    """The states at one place of a pass, by batch."""

    done: Pass
    place: int

    def states(self, number: int) -> torch.Tensor:
        return self.done.stores[self.place][number]


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


def _watched(
    model: StreamedModel, number: int, module: Any, source: _At, only_attention: bool
) -> Generator[Seen]:
    """What a projection of block `number` is given and makes, and what the block makes."""
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []

    def catch(_: Any, given: Any, made: torch.Tensor) -> None:
        caught.append((given[0].detach(), made.detach()))
        if only_attention:
            raise _Enough

    hook = module.register_forward_hook(catch)
    block = model.skeleton.blocks[number]
    try:
        with torch.no_grad(), model.skeleton.filled(model.skeleton.block(number), model.weights):
            for place in range(len(source.done.batches)):
                output = None
                call, hidden = source.done.calls[place][number], source.states(place)
                with contextlib.suppress(_Enough):
                    output = model.run(call, block, hidden).cpu()
                inputs, result = caught.pop()
                yield Seen(inputs.float().cpu(), result.float().cpu(), output)
    finally:
        hook.remove()
