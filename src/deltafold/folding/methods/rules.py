"""What stands in the place of blocks that go: one function a row of `RULES`.

A rule is given the block that is kept, those that go, the kept block's share of a weighted sum, and
the units of a block; it answers with the new block. All arithmetic is in fp32, done when a tensor
is read. Integer tensors stay the kept block's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from deltafold.blocks.align import match
from deltafold.blocks.layout import part_of
from deltafold.blocks.units import Units, features, rearranged
from deltafold.folding.methods.concatenation import concatenate
from deltafold.folding.methods.draft import Block

Blend = Callable[[Block, Sequence[Block], float, Sequence[Units]], Block]


def drop(keep: Block, gone: Sequence[Block], share: float, units: Sequence[Units]) -> Block:
    """Nothing: the kept block stays as it was."""
    return keep


def average(keep: Block, gone: Sequence[Block], share: float, units: Sequence[Units]) -> Block:
    """a theta_l + (1 - a) theta_m of every tensor: MKA (arXiv 2406.16330), eq. 8.

    Several that go share 1 - a equally.
    """
    rest = (1 - share) / len(gone)
    return _summed(keep, gone, share, [rest] * len(gone))


def average_matrices(
    keep: Block, gone: Sequence[Block], share: float, units: Sequence[Units]
) -> Block:
    """`average` of the projections alone; norms and biases are the lower block's, as in MKA's program."""
    rest = (1 - share) / len(gone)
    whole = _summed(keep, gone, share, [rest] * len(gone))

    def read(local: str) -> torch.Tensor:
        return whole.read(local) if _is_projection(local) else keep.read(local)

    return keep.with_tensors(read, _parts(gone))


def collapse(keep: Block, gone: Sequence[Block], share: float, units: Sequence[Units]) -> Block:
    """theta_l + sum_k (theta_l+k - theta_l) of attention and MLP: LaCo (arXiv 2402.11187), eq. 2.

    Each difference is against theta_l as it was. Norms are the lower block's.
    """
    return _parted(keep, _summed(keep, gone, 1.0 - len(gone), [1.0] * len(gone)), gone)


def telescope(keep: Block, gone: Sequence[Block], share: float, units: Sequence[Units]) -> Block:
    """Attention and MLP of the last block under the norms of the first: what LaCo's program does.

    It takes each difference against the sum so far, so that all but the last block's weights cancel.
    """
    return _parted(keep, gone[-1], gone)


def aligned(block: Block, to: Block, units: Sequence[Units]) -> Block:
    """`block` with its units in the order of those of `to`; it computes what it did before."""
    orders = {
        kind.name: match(features(kind, to.read), features(kind, block.read)) for kind in units
    }
    return block.with_tensors(lambda local: rearranged(units, orders, local, block.read(local)))


def aligned_average(
    keep: Block, gone: Sequence[Block], share: float, units: Sequence[Units]
) -> Block:
    """`average`, the units of what goes first put in the order of the kept block's."""
    return average(keep, [aligned(block, keep, units) for block in gone], share, units)


def _summed(keep: Block, gone: Sequence[Block], share: float, shares: Sequence[float]) -> Block:
    def read(local: str) -> torch.Tensor:
        first = keep.read(local)
        if not first.is_floating_point():
            return first
        out = first.float() * share
        for block, weight in zip(gone, shares, strict=True):
            out.add_(block.read(local).float(), alpha=weight)
        return out

    return keep.with_tensors(read, _parts(gone))


def _parted(keep: Block, other: Block, gone: Sequence[Block]) -> Block:
    """The kept block with attention and MLP of `other`, biases too; norms and the like are its own."""

    def read(local: str) -> torch.Tensor:
        return (keep if part_of(local) == "other" else other).read(local)

    return keep.with_tensors(read, _parts(gone))


def _parts(gone: Sequence[Block]) -> list[int]:
    return [number for block in gone for number in block.parts]


def _is_projection(local: str) -> bool:
    return local.endswith("weight") and part_of(local) != "other"


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    `merges` says that what goes lives on in the kept block, so that there must be one. `patch`
    says what the kept block is fitted to afterwards, in closed form. With `looks` blocks are given
    with what text showed of them, and the kept block's share is that of its influence. With `weighs`
    that share is one of a weighted sum.
    """

    blend: Blend
    merges: bool = True
    patch: Literal["none", "replace-me", "replace-me-cosine", "scale"] = "none"
    paper: str = ""
    looks: bool = False
    weighs: bool = False


RULES: dict[str, Rule] = {
    "drop": Rule(drop, merges=False),
    "average": Rule(average, paper="2406.16330", weighs=True),
    "average-matrices": Rule(average_matrices, paper="2406.16330", weighs=True),
    "collapse": Rule(collapse, paper="2402.11187"),
    "telescope": Rule(telescope, paper="2402.11187"),
    "aligned-average": Rule(aligned_average, paper="2209.04836", weighs=True),
    "concatenate": Rule(concatenate, paper="2510.15304", looks=True),
    "replace-me": Rule(drop, patch="replace-me", paper="2505.02819"),
    "replace-me-cosine": Rule(drop, patch="replace-me-cosine", paper="2505.02819"),
    "scale": Rule(drop, patch="scale", paper="2505.24680"),
}
