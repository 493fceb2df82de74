"""What ends the attention and the MLP of a block: a projection, and in some families a norm after it.

    o_proj -> (norm) -> + the stream            down_proj -> (norm) -> + the stream

Blocks of a draft are run over the calibration text and seen there, batch by batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltafold.calibration.probe import is_held
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.states import States
from deltafold.folding.watching import At, Norms, Seen, find_norms, module_of, watched

Part = Literal["attention", "mlp"]

WIDEST = 8192
"""A projection with more inputs that no norm follows is left alone: sums take their square."""
SAME = 1e-3
"""Relative difference of an output from its prediction, above which a projection is not linear."""


class Ends:
    """The ends of the parts of one model's blocks; `original` are its states over the samples."""

    def __init__(self, states: States, original: Pass, whole: Draft):
        self.original, self.whole = original, whole
        self.model, self.layout = states.model, whole.layout
        self.held = [is_held(n, len(states.samples)) for n in range(len(states.samples))]
        self.known: dict[str, bool] = {}
        """By projection: whether the stream gets what is added to it, or to the norm after it."""

    @functools.cached_property
    def norms(self) -> Norms:
        """The norms beside the matrices of a block; blocks are alike, so those of the first."""
        return find_norms(self.model.exact().with_weights(self.whole.tensor), self.layout, 0,
                          At(self.original, 0))  # fmt: skip

    def can_heal(self, part: Part) -> bool:
        """True if the projection that ends this part is one matrix, known by its name."""
        found = self.matrix(part)
        return found is not None and self.module(0, found) is not None

    def matrix(self, part: Part) -> str | None:
        """Local name of the one matrix that ends a part; None where there are several, or none."""
        names = (
            self.layout.attention_outputs() if part == "attention" else self.layout.mlp_outputs()
        )
        found = [each for each in names if len(self.layout.shapes[each]) > 1]
        if len(found) != 1 or len(self.layout.shapes[found[0]]) != 2:
            return None
        if max(self.layout.shapes[found[0]]) > WIDEST and found[0] not in self.norms.after:
            return None
        return found[0]

    def module(self, number: int, local: str) -> Any:
        """The module that holds a block's matrix; None where the model keeps it in another form."""
        return module_of(self.model, self.layout, number, local)

    def store(self, local: str | None = None) -> TensorStore:
        """A store for the inputs of a projection, or for states inside a block."""
        wide = width = self.original.last.shapes[0][-1]
        if local is not None:
            shape = self.layout.shapes[local]
            wide = shape[-1] if shape[-2] == width else shape[-2]
        shapes = [(*batch.ids.shape, wide) for batch in self.original.batches]
        held = sum(store.held_bytes for store in self.original.stores)
        return TensorStore(shapes, self.model.memory_bytes - held, self.model.scratch)

    def modules(self, number: int, local: str) -> list[Any]:
        """The modules that end a part: its projection, and the norm after it where there is one."""
        norm = self.norms.after.get(local)
        names = [local] if norm is None else [local, norm.weight]
        return [self.module(number, each) for each in names]

    def seen(
        self, draft: Draft, number: int, local: str, source: At, only_attention: bool
    ) -> Generator[Seen]:
        """A block of a draft at work, batch by batch, seen at what ends a part."""
        yield from watched(
            self.model.with_weights(draft.tensor), number, self.modules(number, local), source,
            only_attention,
        )  # fmt: skip

    def first(self, draft: Draft, number: int, local: str, entering: Pass) -> Seen:
        """What is seen on the first batch, computed in full precision."""
        model = self.model.exact().with_weights(draft.tensor)
        walk = watched(model, number, self.modules(number, local), At(entering, -1))
        with contextlib.closing(walk):
            return next(walk)

    def is_held(self, number: int) -> torch.Tensor:
        """(n,) True for a batch's real tokens of samples that are held out."""
        batch = self.original.batches[number]
        held = torch.tensor([self.held[n] for n in batch.numbers])
        return held[:, None].expand(batch.real.shape)[batch.real]

    def pair(
        self, draft: Draft, block: Block, made: Block, part: Part, entering: Pass
    ) -> tuple[Seen, Seen]:
        """A block and what it is to become, on the first batch, in full precision.

        What is added to the attention reaches the block's output by other ways too; so the MLP is
        silent then.
        """
        local = self.matrix(part)
        assert local is not None
        if part == "attention":
            silent = self.layout.mlp_outputs()
            block, made = block.without_output(silent), made.without_output(silent)
        one, two = (self.first(draft.with_block(each), each.number, local, entering)
                    for each in (block, made))  # fmt: skip
        return one, two


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
