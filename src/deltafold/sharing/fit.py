"""`--start fit`: what writes into the hidden states, fitted to what the original wrote there.

Block after block both models run on text. Where a block shares, its first matrices (gate and up; query,
key and value) are already composed, so that the last one (down; output) sees inputs h of the student's.
For it the matrix that makes the original's outputs y of them is

    W' = E[y h^T] (E[h h^T] + damping)^-1

and its factors are those of W' in place of W, whitened by h: the best of their rank for these outputs.
Later blocks are fitted on what the fitted ones put out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltafold.blocks.structure import Layer
from deltafold.composed.form import Form
from deltafold.running.engine import Progress, Step
from deltafold.sharing.methods.plan import Plan
from deltafold.sharing.methods.replacing import SharedStudent
from deltafold.sharing.start import Tensors, composed_values
from deltafold.training import Rows

ROWS_AT_ONCE = 8
DAMPING = 1e-2
"""Of the mean diagonal: a few thousand tokens say little of the weakest of 1,536 directions."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def fit(
    student: SharedStudent,
    blocks: Sequence[nn.Module],
    plan: Plan,
    rows: Rows,
    device: torch.device,
    seed: int,
    progress: Progress | None = None,
) -> Tensors:
    """New factors (rank, in), (rows, rank) and scales (out,) of layers that end a sub-layer, by name.

    The student has them then, too.
    """
    student.begin_exam()
    form, shared = plan.form(), {place.block for place in plan.places}
    calls, hidden = _block_calls(student, blocks, rows, device)
    theirs, ours = hidden, list(hidden)
    made: Tensors = {}
    for number in range(max(shared) + 1):
        block = blocks[number]
        writers = _writers(plan, form, number) if number in shared else []
        outputs = _teacher(student, block, writers, calls[number], theirs)
        for layer in writers:
            path = plan.structure.path(number, layer.local)
            module: Any = block.get_submodule(layer.local)
            weight, second = _solved(block, module, outputs[layer.local], calls[number], ours)
            anchor = module.base_weight()
            if anchor is not None:
                anchor = (anchor.T if module.transposed else anchor).float()
            found = composed_values(
                path, form.linears[path], weight, anchor, second, "activation", seed
            )
            for name, value in found.items():
                student.parameters[name].copy_(value)
            made |= {name: value.cpu() for name, value in found.items()}
        ours = list(theirs) if number < min(shared) else _run(block, calls[number], ours)
        if progress:
            words = f"block {number} fitted" if writers else f"block {number}"
            progress(Step("fit", words, number + 1, max(shared) + 1, 0))
    return made


def _writers(plan: Plan, form: Form, number: int) -> list[Layer]:
    """Layers of a block that end a sub-layer and have something of their own to be fitted."""
    return [
        layer
        for layer in plan.structure.of(number, plan.parts)
        if layer.writes and list(form.linears[plan.structure.path(number, layer.local)].factors(""))
    ]


def _block_calls(
    student: SharedStudent, blocks: Sequence[nn.Module], rows: Rows, device: torch.device
) -> tuple[list[Call], list[torch.Tensor]]:
    """How each block is called, besides the hidden states, and these before the first block.

    All pieces have as many rows, so a mask or a position of the first serves for all.
    """
    calls: list[Call] = []
    hidden: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is blocks[0]:
            hidden.append(args[0] if args else kwargs["hidden_states"])
        if len(calls) < len(blocks):
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append((args[1:], rest))
        elif module is blocks[0]:
            raise _DoneError

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    each = min(ROWS_AT_ONCE, len(rows))
    try:
        for first in range(0, len(rows) - each + 1, each):
            try:
                student.logits(rows.ids[first : first + each].to(device))
            except _DoneError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return calls, hidden


class _DoneError(Exception):
    """The rest of a forward pass is not needed."""


def _run(block: nn.Module, call: Call, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
    args, kwargs = call
    made = []
    for each in hidden:
        found = block(each, *args, **kwargs)
        made.append(found[0] if isinstance(found, tuple) else found)
    return made


def _teacher(
    student: SharedStudent,
    block: nn.Module,
    writers: Sequence[Layer],
    call: Call,
    theirs: list[torch.Tensor],
) -> dict[str, list[torch.Tensor]]:
    """Outputs of the original writers, for each piece of text; `theirs` goes on by a block."""
    outputs: dict[str, list[torch.Tensor]] = {layer.local: [] for layer in writers}
    handles = [
        block.get_submodule(local).register_forward_hook(
            lambda module, args, made, kept=kept: kept.append(made)
        )
        for local, kept in outputs.items()
    ]
    student.use(False)
    theirs[:] = _run(block, call, theirs)
    student.use(True)
    for handle in handles:
        handle.remove()
    return outputs


def _solved(
    block: nn.Module, module: Any, outputs: list[torch.Tensor], call: Call, ours: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W' (out, in), E[h h^T]) of one layer, in fp32."""
    o, i = module.out_features, module.in_features
    device = outputs[0].device
    second = torch.zeros(i, i, dtype=torch.float64, device=device)
    cross = torch.zeros(o, i, dtype=torch.float64, device=device)
    left = iter(outputs)

    def add(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        h, y = args[0].reshape(-1, i).float(), next(left).reshape(-1, o).float()
        y = y if module.bias is None else y - module.bias
        second.add_(h.T @ h)
        cross.add_(y.T @ h)

    handle = module.register_forward_pre_hook(add)
    _run(block, call, ours)
    handle.remove()
    tokens = sum(each.numel() // o for each in outputs)
    second, cross = second / tokens, cross / tokens
    damped = second + DAMPING * second.diagonal().mean() * torch.eye(i, device=device)
    weight = torch.linalg.solve(damped, cross.T).T
    return weight.float().contiguous(), second.float()
