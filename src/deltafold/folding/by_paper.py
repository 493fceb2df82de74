"""Patches as papers have them: a matrix T after the MLP before a cut, folded into its down projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from deltafold.blocks.layout import Layout, is_transposed
from deltafold.calibration.stream import Pass, StreamedModel
from deltafold.errors import MismatchError
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.healing import folded_in, replace_me, replace_me_cosine

Kind = Literal["replace-me", "replace-me-cosine", "scale", "heal"]

REPLACE_ME_RIDGE = 1e-3
"""lambda of ReplaceMe, as a share of the mean of M'M's diagonal."""


LINEAR = 1e-2
"""Of what an MLP adds, what twice its down projection may miss of twice of it."""


@dataclass
class Rows:
    """What a block does on one batch, real tokens only: all (n, ...)."""

    x: torch.Tensor
    output: torch.Tensor
    target: torch.Tensor
    held: torch.Tensor


def by_paper(parts: Sequence[Rows], kind: Kind) -> tuple[torch.Tensor, float | None]:
    """(T (w, w), its ridge): what a paper has follow the MLP before a cut."""
    made, output, wanted = (
        torch.cat([getattr(each, name) for each in parts]) for name in ("x", "output", "target")
    )
    if kind == "replace-me-cosine":
        return replace_me_cosine(made, output, wanted), None
    size = float((made.double() ** 2).sum() / made.shape[1])
    return replace_me(made, output, wanted, REPLACE_ME_RIDGE * size), REPLACE_ME_RIDGE


def followed(layout: Layout, block: Block, follow: torch.Tensor) -> Block:
    """The block with a matrix T (w, w) after its MLP: folded into all its down projections."""
    outputs = {
        local: folded_in(
            block.read(local), follow, is_transposed(layout.shapes[local], len(follow))
        )
        for local in layout.mlp_outputs()
    }
    return block.with_tensors(
        lambda local: outputs[local] if local in outputs else block.read(local)
    )


def check_linear(
    model: StreamedModel, draft: Draft, number: int, entering: Pass, kind: Kind
) -> None:
    """Raises MismatchError unless a block's output is linear in its down projections.

    Twice the projections must add twice of what the MLP adds: tried on the first batch, in full
    precision.
    """
    block, outputs = draft.block(number), draft.layout.mlp_outputs()
    tried = (
        block.without_output(outputs),
        block,
        followed(draft.layout, block, 2 * _eye(entering)),
    )
    first = Pass(entering.batches[:1], entering.calls[:1], [entering.last])
    made = []
    for each in tried:
        exact = model.exact().with_weights(draft.with_block(each).tensor)
        with exact.resume(first, -1, [number]) as done:
            made.append(done.last[0][entering.batches[0].real])
    once, twice = made[1] - made[0], made[2] - made[1]
    if not float((twice - once).norm()) <= LINEAR * float(once.norm()):
        raise MismatchError(
            f"{model.checkpoint.label}: a norm follows the down projection, so no matrix "
            f"after it, as {kind} has it, can be folded in; take --rule drop with --closed-form "
            "through, which heals such a model."
        )


def _eye(entering: Pass) -> torch.Tensor:
    """The identity (w, w) of the model's width."""
    return torch.eye(entering.last.shapes[0][-1], dtype=torch.float64)
