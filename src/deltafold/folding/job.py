"""One folding run: what is asked for, checked against what the model is, before any work."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from deltafold.blocks.layout import Layout
from deltafold.blocks.reading import read_layout
from deltafold.blocks.units import Units
from deltafold.checkpoint import Checkpoint
from deltafold.errors import BudgetError, MismatchError, UsageError
from deltafold.folding.methods.presets import Method
from deltafold.folding.request import FoldRequest


@dataclass(frozen=True)
class FoldJob:
    """A model's blocks, and how many of which are to go.

    `count` blocks; where attention and MLP go apart, twice as many of these, or with a `goal` the
    first of them that hold so many parameters.
    """

    layout: Layout
    units: list[Units]
    method: Method
    count: int
    protected: frozenset[int]
    goal: int = 0

    @property
    def is_joint(self) -> bool:
        return self.method.chooser.removes == "part"

    @property
    def share_removed(self) -> float:
        """Share of all parameters that go with the goal, or with `count` blocks."""
        if self.goal:
            return self.goal / self.layout.total
        return self.count * self.layout.parameters / self.layout.total


def make_job(
    checkpoint: Checkpoint,
    method: Method,
    request: FoldRequest,
) -> FoldJob:
    """The job. Raises UsageError, BudgetError, MismatchError, each with what would be possible."""
    if checkpoint.config().get("is_encoder_decoder"):
        raise MismatchError(
            f"{checkpoint.label} has an encoder and a decoder, each with blocks of its own; only a model "
            "with one list of blocks can be folded."
        )
    layout, units = read_layout(checkpoint)
    blocks, parameters = request.blocks, request.parameters
    protected = _protected(request.protect or (), layout.depth, checkpoint.label)
    # A block that is kept must stand before those that it takes in.
    takes_in = method.rule.patch != "none" or (
        method.rule.merges and method.chooser.removes in ("any", "stretch")
    )
    fixed = protected | ({0} if takes_in else set())
    most = _most(layout.depth, fixed, method)
    count = _count(layout, blocks, parameters, most, checkpoint.label, len(protected))
    job = FoldJob(layout, units, method, count, frozenset(fixed))
    if job.is_joint and not (layout.mlp_outputs() and layout.attention_outputs()):
        raise MismatchError(
            f"{checkpoint.label}: the output projections of attention and MLP are not known by "
            "their names, so neither can be dropped alone; choose another method."
        )
    if job.is_joint and parameters is not None:
        # Which sub-layers go is known once they are ranked, and they are not of one size.
        goal = math.ceil((1 - parameters) * layout.total - 1e-6)
        return replace(job, count=most, goal=goal)
    return job


def _protected(protect: Sequence[int], depth: int, label: str) -> set[int]:
    for number in protect:
        if not -depth <= number < depth:
            raise UsageError(
                f"{label} has blocks 0 to {depth - 1}, so block {number} cannot be protected."
            )
    return {number % depth for number in protect}


def _most(depth: int, fixed: Collection[int], method: Method) -> int:
    """The most blocks that may go; merging leaves one of each stretch of free blocks."""
    free = [number for number in range(depth) if number not in fixed]
    if method.chooser.removes == "follower":
        return sum(number - 1 in free for number in free)
    if method.chooser.removes == "stretch":
        longest = run = 0
        for number in range(depth):
            run = 0 if number in fixed else run + 1
            longest = max(longest, run)
        return min(longest, depth - 1)
    return min(len(free), depth - 1)


def _count(
    layout: Layout,
    blocks: int | None,
    parameters: float | None,
    most: int,
    label: str,
    protected: int,
) -> int:
    if (blocks is None) == (parameters is None):
        raise UsageError(
            "Say how much goes: either blocks (6) or the share of parameters kept (0.8)."
        )
    can = f"{label} has {layout.depth} blocks, of which at most {most} can go"
    can += f" ({protected} protected)" if protected else ""
    if blocks is not None:
        if blocks < 1:
            raise UsageError(f"{blocks} blocks is nothing to fold; give at least 1.")
        if blocks > most:
            raise UsageError(
                f"{can}, not {blocks}; ask for fewer{', or --protect fewer' if protected else ''}."
            )
        return blocks
    assert parameters is not None
    if not 0 < parameters < 1:
        raise UsageError(
            f"The share of parameters kept lies between 0 and 1, and {parameters} does not."
        )
    count = math.ceil((1 - parameters) * layout.total / layout.parameters - 1e-9)
    if count > most:
        least = 1 - most * layout.parameters / layout.total
        raise BudgetError(
            f"{can}, which keeps {least:.1%} of its parameters, not {parameters:.1%}; "
            "ask for a larger share."
        )
    return count
