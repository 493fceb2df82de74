"""A model in the making: which blocks it has, and what stands in each, computed when asked.

    Draft   block 0      block 1         block 4        ...
            as it was    0.6 x block 1   as it was
                         0.4 x block 2

A block keeps the number that it had in the model: its place, its masks, its line in the config. A
rule makes a new block out of others by saying how a tensor is made of theirs. Nothing is computed
before a tensor is read, nothing is kept after, and no draft changes: candidates cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from deltafold.blocks.layout import Layout, Read
from deltafold.folding.methods.norms import Norm


@dataclass(frozen=True)
class Shown:
    """What text showed of a block.

    `influence` is block influence, 1 - cos of what enters and what leaves. `activity` holds, by kind
    of unit, the mean absolute value of each channel that units hand to their output matrix (count,
    channels of a unit). `norms` are those that matrices read, by the matrices' local names.
    """

    influence: float
    activity: Mapping[str, torch.Tensor] = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """What stands in one place. `parts` are the blocks of the model that went into it.

    `changed` is False while its tensors are the model's own. `shown` is there only for rules that
    look at text.
    """

    number: int
    read: Read
    parts: tuple[int, ...]
    changed: bool = False
    shown: Shown | None = None

    def with_tensors(self, read: Read, parts: Sequence[int] = ()) -> Block:
        """The block with other tensors, in which also `parts` have a share."""
        return replace(self, read=read, parts=(*self.parts, *parts), changed=True, shown=None)

    def with_shown(self, shown: Shown | None) -> Block:
        """The block with what text showed of it."""
        return replace(self, shown=shown)

    def with_tensor(self, name: str, tensor: torch.Tensor) -> Block:
        """The block with one tensor replaced, by one of the same shape."""
        return self.with_tensors(lambda local: tensor if local == name else self.read(local))

    def without_output(self, names: Sequence[str]) -> Block:
        """The block with the named tensors zero: the sub-layer that they end adds nothing."""
        zeroed = frozenset(names)

        def read(local: str) -> torch.Tensor:
            found = self.read(local)
            return torch.zeros_like(found) if local in zeroed else found

        return self.with_tensors(read)


@dataclass(frozen=True)
class Draft:
    """The blocks in order, over the model's other tensors.

    `source` gives the model's tensors by their names in the checkpoint.
    """

    layout: Layout
    source: Callable[[str], torch.Tensor]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, layout: Layout, source: Callable[[str], torch.Tensor]) -> Draft:
        """The model as it is."""

        def reader(number: int) -> Read:
            return lambda local: source(layout.name(number, local))

        blocks = tuple(Block(n, reader(n), (n,)) for n in range(layout.depth))
        return cls(layout, source, blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def numbers(self) -> list[int]:
        """The model's numbers of the blocks that are left, in order."""
        return [block.number for block in self.blocks]

    def block(self, number: int) -> Block:
        """The block that has this number in the model. Raises ValueError if it is gone."""
        return self.blocks[self.numbers.index(number)]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the checkpoint, in its shape, as this draft has it."""
        found = self.layout.split(name)
        return self.source(name) if found is None else self.block(found[0]).read(found[1])

    def without(self, numbers: Sequence[int]) -> Draft:
        """The draft without these blocks."""
        gone = set(numbers)
        return replace(self, blocks=tuple(b for b in self.blocks if b.number not in gone))

    def with_block(self, block: Block) -> Draft:
        """The draft with another block in the place of the one of the same number."""
        blocks = (block if old.number == block.number else old for old in self.blocks)
        return replace(self, blocks=tuple(blocks))
