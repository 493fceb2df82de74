"""Units of several blocks side by side in one: CoMe (arXiv 2510.15304), section 3.

    lower  [ u u u u u u ]                 [ u   u u   u | v     v ]
    upper  [ v v v v v v ]     become      as wide as each was

How many units come from each block is in proportion to the blocks' influences, heads and neurons
apart. Of each block the strongest are taken: a unit's score is the mean absolute value of what it
hands on, times the sum of the absolute weights that this is multiplied by.

One norm stands before the units of all blocks. So what each block's own norm multiplied by is folded
into the matrices that read it: w g_own / g_kept, so that a unit reads any states as it did in its
own block. The paper averages the norms, which on SmolLM2 comes out about level. Heads go by groups that
share a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltafold.blocks.layout import is_output
from deltafold.blocks.units import Units
from deltafold.folding.methods.draft import Block
from deltafold.folding.methods.norms import Norm
from deltafold.names import role_of


def concatenate(keep: Block, gone: Sequence[Block], share: float, units: Sequence[Units]) -> Block:
    """The strongest units of all blocks. Output biases add up; norms that no unit reads are averaged."""
    blocks = [keep, *gone]
    shares = influences(blocks)
    chosen = {kind.name: strongest(kind, blocks) for kind in units}

    def read(local: str) -> torch.Tensor:
        norm = _norm_at(keep, local)
        if norm is not None:
            return (norm.divisor(keep.read) - norm.offset).float()
        slices = [(kind, each) for kind in units for each in kind.all_slices if each.local == local]
        made = keep.read(local)
        if slices:
            parts = [_under_kept_norm(block, keep, local, units) for block in blocks]
            made = parts[0]
            for kind, each in slices:
                every = torch.cat([each.parts(part, kind.count) for part in parts])
                made = each.put(made, every[chosen[kind.name]])
        elif local.endswith("bias") and is_output(local):
            made = torch.stack([block.read(local).float() for block in blocks]).sum(0)
        elif role_of(local) == "norm" and _reads_known(keep, local):
            every = torch.stack([block.read(local).double() for block in blocks])
            made = torch.tensordot(shares, every, dims=1).float()
        return made

    return keep.with_tensors(read, [number for block in gone for number in block.parts])


def influences(blocks: Sequence[Block]) -> torch.Tensor:
    """The blocks' shares of their influences together (b,); alike where text showed none."""
    found = [1.0 if block.shown is None else max(0.0, block.shown.influence) for block in blocks]
    total = sum(found)
    return torch.tensor([each / total if total else 1 / len(found) for each in found]).double()


def widths(shares: Sequence[float], count: int) -> list[int]:
    """How many of `count` units come from each block, by largest remainders; of equals the first.

    >>> widths([0.75, 0.25], 6)
    [5, 1]
    """
    exact = [count * each for each in shares]
    made = [int(each) for each in exact]
    order = sorted(range(len(made)), key=lambda n: (made[n] - exact[n], n))
    for place in order[: count - sum(made)]:
        made[place] += 1
    return made


def strongest(kind: Units, blocks: Sequence[Block]) -> torch.Tensor:
    """Numbers (count,) of the units taken, those of the first block first; the next go on counting."""
    wides = widths(influences(blocks).tolist(), kind.count)
    taken = []
    for place, (block, wide) in enumerate(zip(blocks, wides, strict=True)):
        order = scores(kind, block).argsort(descending=True, stable=True)
        taken.append(order[:wide].sort().values + place * kind.count)
    return torch.cat(taken)


def scores(kind: Units, block: Block) -> torch.Tensor:
    """Mean absolute activation x sum of absolute outgoing weights (count,), added up over channels."""
    made = torch.zeros(kind.count, dtype=torch.float64)
    activity = None if block.shown is None else block.shown.activity.get(kind.name)
    for each in kind.outputs:
        rows = each.parts(block.read(each.local).float(), kind.count)
        outgoing = rows.view(kind.count, each.each, -1).abs().double().sum(-1)
        made += (outgoing if activity is None else outgoing * activity).sum(1)
    return made


def _under_kept_norm(block: Block, keep: Block, local: str, units: Sequence[Units]) -> torch.Tensor:
    """A block's tensor as it has to be where the kept block's norm stands before it, in fp32."""
    tensor = block.read(local).float()
    matrix = local.removesuffix("bias") + "weight" if local.endswith("bias") else local
    norm = None if keep.shown is None else keep.shown.norms.get(matrix)
    if norm is None:
        return tensor
    axis = next(s.axis for kind in units for s in kind.all_slices if s.local == matrix)
    ratio = norm.gain(block.read) / norm.divisor(keep.read)
    if tensor.dim() == 2:
        return (tensor.double() * (ratio if axis == 0 else ratio[:, None])).float()
    weight = block.read(matrix).double()
    gap = norm.shift(block.read) - ratio * norm.shift(keep.read)
    return (tensor.double() + (weight @ gap if axis == 0 else gap @ weight)).float()


def _norm_at(block: Block, local: str) -> Norm | None:
    """The norm whose weight this is, of those that matrices read."""
    norms = {} if block.shown is None else block.shown.norms
    return next((each for each in norms.values() if each.weight == local), None)


def _reads_known(block: Block, local: str) -> bool:
    """False for the bias of a norm that matrices read: it stays the kept block's."""
    norms = {} if block.shown is None else block.shown.norms
    return all(each.bias != local for each in norms.values())
