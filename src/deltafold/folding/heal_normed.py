"""Healing of a part that a norm ends: the norm's gains and the projection before it, in turn.

The mathematics is in `methods/normed.py`; here are the rows, the block that comes of it, and the test
that the stream gets what the norm makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deltafold.blocks.layout import is_transposed
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass
from deltafold.folding.ends import SAME, Ends, Part
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.normed import Ending, Rows, heal_normed
from deltafold.folding.methods.norms import Norm
from deltafold.folding.watching import At, run_norm
from deltafold.running.devices import put


@dataclass
class _Gathered:
    """What was seen of a part, by batch: inputs of its projection, and the stream beside it."""

    inputs: TensorStore
    stream: TensorStore
    outputs: TensorStore | None


def heal_through_norm(
    ends: Ends, draft: Draft, place: int, part: Part, entering: Pass, wanted: TensorStore
) -> tuple[Draft, dict[str, Any], Pass | None]:
    """(the draft healed, the row for the record, what leaves the block: of an MLP).

    `wanted` is what the stream shall be after the part.
    """
    block, local = draft.blocks[place], ends.matrix(part)
    assert local is not None
    norm, weight = ends.norms.after[local], block.read(local).float()
    turned = not is_transposed(tuple(weight.shape), entering.last.shapes[0][-1])
    ending = Ending(
        put(weight.T if turned else weight),
        put(norm.gain(block.read).float()),
        _normaliser(ends, norm),
    )
    row: dict[str, Any] = {"block": block.number, "part": part, "kind": "heal", "norm": True}
    with ends.store(local) as inputs, ends.store() as stream:
        outputs = None if part == "attention" else ends.model.store_beside(entering)
        seen = _Gathered(inputs, stream, outputs)
        _gather(ends, draft, block, local, entering, seen)
        leaving = None if outputs is None else Pass(entering.batches, entering.calls, [outputs])
        healed, before, after, ridge = heal_normed(ending, _rows(ends, seen, entering, wanted))
        made = block
        if after < before and bool(weight.any()):  # a sub-layer that was dropped stays so
            new = (healed.weight.T if turned else healed.weight).contiguous().cpu()
            made = block.with_tensor(local, new)
            made = made.with_tensor(norm.weight, healed.gain.cpu() - norm.offset)
        if made is block or not _follows(ends, draft, block, made, part, entering):
            row |= {"ridge": None, "error_before": before, "error_after": before, "kept": False}
            return draft, row, leaving
        if leaving is not None:
            for number in range(len(entering.batches)):
                n = healed.result(put(inputs[number]))[1]
                leaving.last[number] = stream[number] + (healed.gain * n).cpu()
    row |= {"ridge": ridge, "error_before": before, "error_after": after, "kept": True}
    return draft.with_block(made), row, leaving


def _gather(
    ends: Ends, draft: Draft, block: Block, local: str, entering: Pass, into: _Gathered
) -> None:
    """Run the block as it is: what its projection is given, and the stream without the part."""
    inner = into.outputs is None
    walk = ends.seen(draft, block.number, local, At(entering, -1), inner)
    for number, seen in enumerate(walk):
        into.inputs[number] = seen.inputs[0]
        if into.outputs is None:
            into.stream[number] = entering.last[number]
        else:
            assert seen.output is not None
            into.outputs[number] = seen.output
            into.stream[number] = seen.output - seen.results[-1]


def _rows(
    ends: Ends, seen: _Gathered, entering: Pass, wanted: TensorStore
) -> Callable[[], Iterator[Rows]]:
    """The rows of real tokens, batch by batch, as often as they are asked for."""

    def rows() -> Iterator[Rows]:
        for number, batch in enumerate(entering.batches):
            x, stream, target = (
                put(store[number][batch.real]) for store in (seen.inputs, seen.stream, wanted)
            )
            yield Rows(x, stream, target, put(ends.is_held(number)))

    return rows


def _normaliser(ends: Ends, norm: Norm) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the norm makes of states (..., w) before its gains."""
    module = ends.module(0, norm.weight)
    return lambda states: run_norm(module, 1.0 - norm.offset, norm.bias is not None, states)


def _follows(
    ends: Ends, draft: Draft, block: Block, made: Block, part: Part, entering: Pass
) -> bool:
    """True if the stream gets what the norm after a part makes, tried on the first batch."""
    local = ends.matrix(part)
    assert local is not None
    if local not in ends.known:
        one, two = ends.pair(draft, block, made, part, entering)
        assert one.output is not None and two.output is not None
        real = entering.batches[0].real
        added = (two.results[-1] - one.results[-1])[real]
        gap = (two.output - one.output)[real] - added
        ends.known[local] = float(gap.norm()) <= SAME * float(added.norm())
    return ends.known[local]
