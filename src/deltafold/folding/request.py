"""What `fold` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from deltafold.running.common import OneModel, Running, Sampled, Scored, Seeded
from deltafold.running.request import (
    OUTPUT,
    SIZE,
    TEXT,
    TRAINING,
    WHAT,
    argument,
    asked,
    option,
    parse_numbers,
)

HEALINGS = ("none", "cut", "through")
Pool = Literal["last", "mean"]
POOLS: tuple[Pool, ...] = ("last", "mean")
QUANTISERS = ("int8", "int4")


@asked
class FoldRequest(Running, Sampled, Scored, Seeded, OneModel):
    """Fold alike blocks of one model: an ordinary checkpoint with fewer of them.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    Example: deltafold fold smollm2/ -o smaller/ --blocks 6
    """

    method: str = argument(
        "See docs/commands/fold.md for all.",
        default="auto",
        kw_only=False,
        flag="--method",
        flags=("-m",),
        panel=WHAT,
    )
    blocks: int | None = option("Blocks that go.", default=None, panel=SIZE, flags=("-n",))
    parameters: float | None = option(
        "Share of all parameters to keep, instead of --blocks.", default=None, panel=SIZE
    )
    similarity: str | None = option(
        "How alike states are: cosine, angular, cka, npib, ...", default=None
    )
    selection: str | None = option(
        "Which go: adjacent-pairs, contiguous, lowest, greedy, ...", default=None
    )
    rule: str | None = option("What stays instead: drop, average, replace-me, ...", default=None)
    protect: Sequence[int] | None = option(
        "Blocks to leave alone, e.g. 0,1,-1. Default: the method's.",
        default=None, parse=parse_numbers,
    )  # fmt: skip
    closed_form: str | None = option(
        "Heal by least squares: none, at each cut, or through the rest. Default: the method's.",
        default=None, choices=HEALINGS, noun="healing",
    )  # fmt: skip
    steps: int = option(
        "Steps of training what is left towards the model; 0: none.",
        default=0, panel=TRAINING, low=0, wrong="{value} steps of healing cannot be; give 0 or more.",
        old=("heal",), old_flags=("--heal",),
    )  # fmt: skip
    calibration: str | Path = option(
        "Text that shows what blocks do: a file, datasets:NAME, pages, self, or none.",
        default="pages", panel=TEXT,
    )  # fmt: skip
    pool: Pool = option(
        "A sample's state: of its last token, or mean.",
        default="last", panel=TEXT, choices=POOLS, noun="pooling",
    )  # fmt: skip
    quantize: str | None = option(
        "Then quantise the weights by torchao: int8 or int4.", default=None, panel=OUTPUT
    )
    explain: str | Path | None = option(
        "Folder for similarities, manifold and merges.", default=None, panel=OUTPUT, identity=False,
        record=False,
    )  # fmt: skip
