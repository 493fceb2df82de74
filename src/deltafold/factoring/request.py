"""What `factor` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltafold.errors import UsageError
from deltafold.factoring.methods.presets import Method
from deltafold.linalg import DAMPING
from deltafold.running.common import Clustered, OneModel, Sampled, Scored, Seeded
from deltafold.running.request import OUTPUT, SIZE, TEXT, WHAT, argument, asked, option

GROUPINGS = ("neighbours", "alike")


@asked
class FactorRequest(Clustered, Sampled, Scored, Seeded, OneModel):
    """Low-rank factors in place of a model's matrices: fewer parameters at the same depth.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    Example: deltafold factor smollm2/ -o small/ --method lord --parameters 0.8
    """

    method: str = argument(
        "See docs/commands/factor.md for all.",
        default="lord", kw_only=False, flag="--method", flags=("-m",), panel=WHAT,
    )  # fmt: skip
    parameters: float = option(
        "Share of all parameters to keep.", default=0.8, panel=SIZE, above=0, below=1,
        wrong="The share of parameters kept lies between 0 and 1, and {value:g} does not.",
    )  # fmt: skip
    group: int = option(
        "basis-sharing: blocks with one basis together.", default=2, low=1,
        wrong="{value} blocks make no group; give at least 1.",
    )  # fmt: skip
    grouping: str = option(
        "basis-sharing: neighbours, or blocks with alike inputs.", default="neighbours",
        choices=GROUPINGS, noun="grouping",
    )  # fmt: skip
    sequential: bool = option(
        "Fit each block to what the factored ones before it give.", default=True
    )
    refit: bool = option(
        "basis-sharing: coefficients fitted to each block's own inputs.", default=True
    )
    centre: bool = option("Keep the mean of outputs by a bias.", default=False)
    damping: float = option(
        "Share of the mean that is added to moments' diagonals.", default=DAMPING, low=0, high=1,
        wrong="damping lies between 0 and 1, and {value:g} does not.",
    )  # fmt: skip
    trials: int = option(
        "bolaco: splits that are tried.", default=24, low=1,
        wrong="{value} trials find nothing; give at least 1.",
    )  # fmt: skip
    calibration: str | Path = option(
        "Text that shows what layers see: a file, datasets:NAME, pages, self, or none.",
        default="pages", panel=TEXT,
    )  # fmt: skip
    dense: bool = option(
        "Write the ordinary model that the factors amount to.", default=False, panel=OUTPUT
    )

    def check(self) -> None:
        """What no single field can tell. Raises UsageError."""
        method = Method.of(self.method)
        if self.centre and not method.whitened:
            raise UsageError(
                f"{method.name} does not look at inputs, so it has no mean to keep; leave out --centre, or "
                "choose lord."
            )
        if str(self.calibration) == "none" and method.looks:
            raise UsageError(
                f"{method.name} looks at the inputs of the layers; give --calibration a file, or leave "
                "it out for the text that comes with deltafold."
            )

    @property
    def texts(self) -> Sequence[str | Path]:
        """What is also measured before and after, beside tasks: a plain file."""
        is_file = self.tasks and self.text is not None and Path(self.text).is_file()
        return [self.text] if is_file and self.text is not None else []
