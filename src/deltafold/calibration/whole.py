"""Gradients with the whole model in memory: faster than block by block, where there is room."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deltafold.calibration.backward import Gradients, Hook, Loss
from deltafold.calibration.batches import Batch
from deltafold.calibration.stream import StreamedModel
from deltafold.running.devices import steady_backward


def backward_whole(
    model: StreamedModel,
    batches: Sequence[Batch],
    loss: Loss,
    hook: Hook,
    wanted: Callable[[str], bool] = lambda name: True,
) -> float:
    """What `backward` does, with the whole model in memory: nothing is computed twice."""
    skeleton, total, row = model.skeleton, 0.0, 0
    inside = [*skeleton.outside(), *(n for k in range(model.n_blocks) for n in skeleton.block(k))]

    def with_grad(names: Sequence[str]) -> list[str]:
        return [name for name in names if any(map(wanted, skeleton.sources(name)))]

    with torch.enable_grad(), skeleton.filled(inside, model.weights, with_grad(inside)) as below:
        model.entry.probe()
        model.entry.note(batches[0].ids[:1, :1])
        heads = with_grad(model.entry.head_names(model.weights))
        with model.head(heads) as (head, above):
            for batch in batches:
                hidden, calls = model.entry.note(batch.ids)
                for block, call in zip(skeleton.blocks, calls, strict=True):
                    hidden = call.run(block, hidden)
                rows = hidden[batch.counted]
                leaf = rows.detach().requires_grad_()
                for start, part in model.parts(leaf):
                    value = loss(row + start, head(part))
                    with steady_backward():
                        value.backward()
                    total += float(value.detach())
                if rows.requires_grad:  # False if nothing below the head is wanted
                    with steady_backward():
                        rows.backward(leaf.grad)
                row += len(rows)
    found: Gradients = {}
    for parameters in (above, below):
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            for source, piece in skeleton.pieces(name, parameter.grad.cpu()):
                if wanted(source):
                    found[source] = found[source] + piece if source in found else piece
    for name, gradient in found.items():
        hook(name, gradient)
    return total
