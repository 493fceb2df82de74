"""Gradients of a whole model with one block in memory: every block's forward is computed again.

    forward    inputs of every block kept:  h0 -> h1 -> ... -> hL          (a store each)
    head       loss(logits(hL))             dL/dhL, gradients of norm and head
    block n    h(n) -> block, with grad     dL/dh(n+1) -> dL/dh(n), gradients of the block
    embedding  ids -> h0, with grad         gradients of the embedding

They are the exact gradients that autograd gives with the whole model in memory, up to the order of
sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from deltafold.calibration.batches import Batch
from deltafold.calibration.skeleton import Skeleton
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass, StreamedModel
from deltafold.errors import MismatchError
from deltafold.running.devices import steady_backward
from deltafold.running.engine import trim

Loss = Callable[[int, torch.Tensor], torch.Tensor]
"""(first row, logits (n, vocabulary) of the counted rows from there) -> the sum of their losses."""

Hook = Callable[[str, torch.Tensor], None]
"""(checkpoint tensor, its gradient)"""

Watcher = Callable[[dict[str, nn.Parameter]], AbstractContextManager[object]]
"""Parameters at work -> a context in which their module runs on a batch."""

Entered = Callable[[Batch, torch.Tensor, torch.Tensor], None]
"""(batch, hidden states (b, t, width) before the first block, the gradient in them)"""

Gradients = dict[str, torch.Tensor]


def backward(
    model: StreamedModel,
    batches: Sequence[Batch],
    loss: Loss,
    hook: Hook,
    wanted: Callable[[str], bool] = lambda name: True,
    watch: Watcher = nullcontext,
    entered: Entered | None = None,
) -> float:
    """Gradients of a sum of losses, of all checkpoint tensors that are `wanted`; returns that sum.

    Counted rows are numbered over all batches, as in `StreamedModel.logits`. `hook` is given each
    tensor once, from the head down to the embedding, and one block's gradients are in memory at a
    time. A tied tensor comes last. `watch` and `entered` see modules at work. Raises
    MismatchError where a tensor cannot be told apart from others in its parameter, or its gradient
    would be incomplete.
    """
    skeleton = model.skeleton
    below = _with_grad(skeleton, skeleton.outside(), wanted)
    waiting: Gradients = {}
    with torch.enable_grad(), model.forward(batches, keep=True) as done:
        with model.store_beside(done) as flowing:
            total = _through_head(model, done, flowing, loss, wanted, watch, waiting)
            trim()
            shared = {source for name in below for source in skeleton.sources(name)}
            for name in [name for name in waiting if name not in shared]:
                hook(name, waiting.pop(name))
            for number in reversed(range(model.n_blocks)):
                for name, gradient in _through_block(model, done, number, flowing, wanted, watch):
                    hook(name, gradient)
                trim()
            for place, batch in enumerate(done.batches if entered else ()):
                entered(batch, done.stores[0][place], flowing[place])  # type: ignore[misc]
            if below:
                _through_embedding(model, done, flowing, below, wanted, waiting)
        for name, gradient in waiting.items():
            hook(name, gradient)
    return total


def _with_grad(
    skeleton: Skeleton, names: Sequence[str], wanted: Callable[[str], bool]
) -> list[str]:
    return [name for name in names if any(map(wanted, skeleton.sources(name)))]


def _through_head(
    model: StreamedModel,
    done: Pass,
    flowing: TensorStore,
    loss: Loss,
    wanted: Callable[[str], bool],
    watch: Watcher,
    into: Gradients,
) -> float:
    """The total loss; gradients of the last hidden states go to `flowing`, of weights to `into`."""
    total, row = 0.0, 0
    names = _with_grad(model.skeleton, model.entry.head_names(model.weights), wanted)
    with model.head(names) as (head, parameters):
        for place, batch in enumerate(done.batches):
            rows = done.rows(place).requires_grad_()
            for start, part in model.parts(rows):
                with watch(parameters):
                    logits = head(part)
                value = loss(row + start, logits)
                with steady_backward():
                    value.backward()
                total += float(value.detach())
            row += len(rows)
            whole = torch.zeros(flowing.shapes[place], device=rows.device)
            if rows.grad is not None:
                whole[batch.counted] = rows.grad
            flowing[place] = whole
        _collect(model.skeleton, parameters, names, wanted, into)
    return total


def _through_block(
    model: StreamedModel,
    done: Pass,
    number: int,
    flowing: TensorStore,
    wanted: Callable[[str], bool],
    watch: Watcher,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Turns gradients of a block's outputs into those of its inputs; yields those of its weights."""
    block, names = model.skeleton.blocks[number], model.skeleton.block(number)
    with_grad = _with_grad(model.skeleton, names, wanted)
    found: Gradients = {}
    with model.skeleton.filled(names, model.weights, with_grad) as parameters:
        for place in range(len(done.batches)):
            hidden = model.moved(done.stores[number].near(place)).clone().requires_grad_()
            with watch(parameters):
                made = done.calls[place][number].run(block, hidden)
            with steady_backward():
                made.backward(model.moved(flowing.near(place)))
            if hidden.grad is not None:
                flowing[place] = hidden.grad
        _collect(model.skeleton, parameters, with_grad, wanted, found)
    done.stores[number + 1].close()
    yield from found.items()


def _through_embedding(
    model: StreamedModel,
    done: Pass,
    flowing: TensorStore,
    names: Sequence[str],
    wanted: Callable[[str], bool],
    into: Gradients,
) -> None:
    with model.skeleton.filled(model.skeleton.outside(), model.weights, names) as parameters:
        for place, batch in enumerate(done.batches):
            hidden, calls = model.entry.note(batch.ids)
            if any(call.carries_gradients for call in calls):
                raise MismatchError(
                    f"{model.label} feeds embeddings into its blocks beside hidden states, so "
                    "gradients of embeddings would be incomplete; leave them out."
                )
            if hidden.requires_grad:  # False if only the last norm, say, is wanted
                with steady_backward():
                    hidden.backward(model.moved(flowing.near(place)))
        _collect(model.skeleton, parameters, names, wanted, into)


def _collect(
    skeleton: Skeleton,
    parameters: dict[str, nn.Parameter],
    names: Sequence[str],
    wanted: Callable[[str], bool],
    into: Gradients,
) -> None:
    """Add the parameters' gradients to `into`, by checkpoint tensor."""
    for name in names:
        gradient = parameters[name].grad
        if gradient is None:
            continue
        for source, piece in skeleton.pieces(name, gradient.cpu()):
            if wanted(source):
                into[source] = into[source] + piece if source in into else piece
