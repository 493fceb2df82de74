"""Hidden states multiplied by a number from a cut on, without a place for it in the model.

    h c -> block 5 -> block 6 -> norm         the same as         h -> block 5 / c -> block 6 / c -> norm

Blocks that read the states through norms read the same whatever their length. So the states need not
be multiplied: what later blocks add to them is divided. That is exact but for the norms' epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass
from deltafold.errors import MismatchError
from deltafold.folding.ends import Ends
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.norms import Norm

SCALED = 1e-2
"""Of what a block adds to the states, what it may miss of its share."""


def scaled_after(ends: Ends, draft: Draft, place: int, factor: float) -> Draft:
    """The draft as if the states that leave the block at `place` were multiplied by `factor`.

    They are that much smaller than they should be from there on, down to the last norm.
    """
    for block in draft.blocks[place + 1 :]:
        draft = draft.with_block(_divided(ends, block, factor))
    return draft


def check_scaled(ends: Ends, before: Draft, after: Draft, factor: float, leaving: Pass) -> None:
    """Raises MismatchError unless the first block that `leaving` enters does its part of it.

    That is: on states as they are, the divided block adds what the undivided one adds to states
    `factor` times as large, over `factor`. Blocks are alike, so one is tried, on the first batch.
    """
    number = next(b.number for a, b in zip(before.blocks, after.blocks, strict=True) if a is not b)
    model, states = ends.model.exact(), leaving.last[0]
    with TensorStore([tuple(states.shape)], model.memory_bytes, model.scratch) as larger:
        larger[0] = factor * states
        one = Pass(leaving.batches[:1], leaving.calls[:1], [larger])
        other = Pass(leaving.batches[:1], leaving.calls[:1], [leaving.last])
        with (
            model.with_weights(before.tensor).resume(one, -1, [number]) as wanted,
            model.with_weights(after.tensor).resume(other, -1, [number]) as found,
        ):
            real = leaving.batches[0].real
            gap = (wanted.last[0] / factor - found.last[0])[real]
            added = (wanted.last[0] / factor - states)[real]
    if not float(gap.norm()) <= SCALED * float(added.norm()):
        raise MismatchError(
            f"{ends.model.checkpoint.label}: blocks do not read hidden states through norms alone, so "
            "these cannot be scaled at a cut; take --rule drop with --closed-form through."
        )


def _divided(ends: Ends, block: Block, factor: float) -> Block:
    """The block with what it adds to the states divided."""
    layout = ends.layout
    outputs = [*layout.attention_outputs(), *layout.mlp_outputs()]
    norms = {m: norm for m, norm in ends.norms.after.items() if m in outputs}
    normed = {each: norm for norm in norms.values() for each in (norm.weight, norm.bias) if each}
    plain = {local for local in outputs if _matrix_of(local) not in norms}

    def read(local: str) -> torch.Tensor:
        tensor = block.read(local)
        if local in normed:
            return _less(tensor, local, normed, factor)
        return tensor.float() / factor if local in plain else tensor

    return block.with_tensors(read)


def _less(
    tensor: torch.Tensor, local: str, normed: Mapping[str, Norm], factor: float
) -> torch.Tensor:
    """A norm's weight or bias with the gain, or the bias, divided."""
    offset = normed[local].offset if local == normed[local].weight else 0.0
    return (tensor.float() + offset) / factor - offset


def _matrix_of(local: str) -> str:
    """The local name of the matrix that a bias belongs to; of a matrix its own."""
    return local.removesuffix("bias") + "weight" if local.endswith(".bias") else local
