"""A block at work on text: what its projections are given, and which norms stand beside them.

    norm -> q_proj ... o_proj -> (norm) -> + -> norm -> up_proj ... down_proj -> (norm) -> +

Which norm a matrix reads, and which norm reads a matrix, is seen at work: the one's result lies
where the other's input does. So an architecture needs no code here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deltafold.blocks.layout import Layout
from deltafold.calibration.stream import Pass, StreamedModel
from deltafold.folding.methods.norms import Norm


@dataclass
class At:
    """The states at one place of a pass, by batch."""

    done: Pass
    place: int

    def states(self, number: int) -> torch.Tensor:
        """The states (b, t, w) of one batch."""
        return self.done.stores[self.place][number]


@dataclass
class Seen:
    """One batch in a block.

    `inputs` (b, t, i) and `results` (b, t, o) of the modules that were watched; `output` (b, t, w) is
    the block's, None where its forward was ended early.
    """

    inputs: list[torch.Tensor]
    results: list[torch.Tensor]
    output: torch.Tensor | None


class _Enough(BaseException):
    """Ends a block's forward once the last watched module has been seen."""


def module_of(model: StreamedModel, layout: Layout, number: int, local: str) -> Any:
    """The module that holds a block's tensor; None where the model keeps it in another form."""
    skeleton = model.skeleton
    for name in skeleton.block(number):
        group = skeleton.groups.get(name)
        if group and group.converter is None and group.names == (layout.name(number, local),):
            return skeleton.model.get_submodule(name.rpartition(".")[0])
    return None


def watched(
    model: StreamedModel, number: int, modules: Sequence[Any], source: At, early: bool = False
) -> Generator[Seen]:
    """Block `number` at work, batch by batch, seen at some of its modules.

    `early` ends the block's forward once the last of them has been seen.
    """
    caught: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def catcher(place: int) -> Callable[[Any, Any, Any], None]:
        def catch(_: Any, given: Any, made: torch.Tensor) -> None:
            caught[place] = (given[0].detach(), made.detach())
            if early and place == len(modules) - 1:
                raise _Enough

        return catch

    hooks = [each.register_forward_hook(catcher(place)) for place, each in enumerate(modules)]
    block = model.skeleton.blocks[number]
    try:
        with torch.no_grad(), model.skeleton.filled(model.skeleton.block(number), model.weights):
            for place in range(len(source.done.batches)):
                output = None
                call, hidden = source.done.calls[place][number], source.states(place)
                with contextlib.suppress(_Enough):
                    output = model.run(call, block, hidden).cpu()
                pairs = [caught.pop(each) for each in range(len(modules))]
                yield Seen(
                    [given.float().cpu() for given, _ in pairs],
                    [made.float().cpu() for _, made in pairs],
                    output,
                )
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Norms:
    """The norms beside a block's matrices, by the matrices' local names."""

    before: dict[str, Norm] = field(default_factory=dict)
    after: dict[str, Norm] = field(default_factory=dict)


def find_norms(model: StreamedModel, layout: Layout, number: int, source: At) -> Norms:
    """The norms beside the matrices of block `number`, seen on the first batch."""
    locals_ = {
        local: module
        for local in layout.shapes
        if local.endswith("weight")
        and (module := module_of(model, layout, number, local)) is not None
    }
    given, made = _traced(model, number, locals_, source)
    found = Norms()
    for local, shape in layout.shapes.items():
        if local not in made or len(shape) != 1:
            continue
        readers = [m for m in made if _same(given[m], made[local]) and len(layout.shapes[m]) == 2]
        writers = [m for m in made if _same(made[m], given[local]) and len(layout.shapes[m]) == 2]
        norm = _norm(locals_[local], layout, local, given[local]) if readers or writers else None
        if norm is not None:
            found.before |= dict.fromkeys(readers, norm)
            found.after |= dict.fromkeys(writers, norm)
    return found


def _traced(
    model: StreamedModel, number: int, modules: dict[str, Any], source: At
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(inputs, results) of modules that ran on the first batch, the very tensors that they had."""
    given: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}

    def catcher(local: str) -> Callable[[Any, Any, Any], None]:
        def catch(_: Any, inputs: Any, result: Any) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(result, torch.Tensor):
                given[local], made[local] = inputs[0], result

        return catch

    hooks = [each.register_forward_hook(catcher(local)) for local, each in modules.items()]
    block = model.skeleton.blocks[number]
    try:
        with torch.no_grad(), model.skeleton.filled(model.skeleton.block(number), model.weights):
            model.run(source.done.calls[0][number], block, source.states(0))
    finally:
        for hook in hooks:
            hook.remove()
    return given, made


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True where both are the same numbers in memory, whatever their shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _norm(module: Any, layout: Layout, local: str, states: torch.Tensor) -> Norm | None:
    """What a module does with its weight, tried with zeros and ones; None where it is no norm."""
    bias = local.removesuffix("weight") + "bias"
    has_bias = getattr(module, "bias", None) is not None
    if has_bias and bias not in layout.shapes:
        return None
    states = states.detach().float()
    zero, one = (run_norm(module, value, has_bias, states) for value in (0.0, 1.0))
    n = one - zero
    size = float(n.square().sum())
    if not size:
        return None
    offset = float((zero * n).sum()) / size
    apart = float((zero - offset * n).square().sum())
    if apart > 1e-6 * size:  # not linear in its weight
        return None
    return Norm(local, bias if has_bias else None, round(offset, 3))


def run_norm(module: Any, value: float, has_bias: bool, states: torch.Tensor) -> torch.Tensor:
    """A norm on states (..., w) with all of its weight at one value, and no bias."""
    width = states.shape[-1]
    like = {"weight": torch.full((width,), value, device=states.device)}
    if has_bias:
        like["bias"] = torch.zeros(width, device=states.device)
    with torch.no_grad():
        made: torch.Tensor = torch.func.functional_call(module, like, (states,))
    return made.float()
