"""What `share` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltafold.errors import UsageError
from deltafold.running.common import Clustered, OneModel, Scored, Seeded
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

DELTA = "deltallm"
METHODS = (DELTA, "no-anchor", "drop-mlp", "tie")
PLACEMENTS = ("alternating", "sequential", "searched")
MATRICES = {"mlp": ("mlp",), "attention": ("attention",), "both": ("mlp", "attention")}
PROTECTED = (0, 1, -2, -1)
FIT = "fit"
STARTS = ("svd", "activation", "zero", FIT)
TUNES = ("delta", "all")
PLANNED = (
    "shared", "rank", "parameters", "placement", "matrices", "protect", "split", "row_scale",
)  # fmt: skip
"""Options that say what is shared; the rest says how it is trained and written."""


@asked
class ShareRequest(Clustered, Scored, Seeded, OneModel):
    """Let blocks use earlier blocks' weights plus small deltas, and train the deltas.

    Two of `parameters`, `shared` and `rank` say how much, or `parameters` alone. Returns the record.
    Raises DeltafoldError; nothing is left under `output` then.

    Example: deltafold share smollm2/ -o shared/ --parameters 0.88 --calibration text.jsonl --steps 500
    """

    method: str = argument(
        "deltallm; or a control: no-anchor, drop-mlp, tie.", kw_only=False,
        default=DELTA, flag="--method", flags=("-m",), panel=WHAT, choices=METHODS, noun="method",
    )  # fmt: skip
    parameters: float | None = option(
        "Share of all parameters to keep, e.g. 0.88.", default=None, panel=SIZE, above=0, below=1,
        wrong="The share of parameters kept lies between 0 and 1, and {value} does not.",
    )  # fmt: skip
    shared: int | None = option(
        "Blocks that refer to another.", default=None, panel=SIZE, flags=("-n",), low=1,
        wrong="shared must be at least 1, not {value}.",
    )  # fmt: skip
    rank: int | None = option(
        "Rank of each delta matrix.", default=None, panel=SIZE, flags=("-r",), low=1,
        wrong="rank must be at least 1, not {value}.",
    )  # fmt: skip
    split: float = option(
        "Rank of down and output projections over that of the others.", default=1.0, panel=SIZE,
        low=0.05, high=20, wrong="split lies between 0.05 and 20, and {value:g} does not.",
    )  # fmt: skip
    placement: str = option(
        "Which blocks: alternating, sequential, or searched by what each costs.", default="alternating",
        choices=PLACEMENTS, noun="placement",
    )  # fmt: skip
    matrices: str = option(
        "What of a block: mlp, attention or both.", default="mlp",
        choices=tuple(MATRICES), noun="choice of matrices",
    )  # fmt: skip
    protect: Sequence[int] = option(
        "Blocks to leave alone.", default=PROTECTED, parse=parse_numbers, shown_default="0,1,-2,-1"
    )
    row_scale: bool | None = option(
        "Scale each row of an anchor by a number of its own. Default: unless --rank is given.",
        default=None, old=("scale",), old_flags=("--scale",),
    )  # fmt: skip
    start: str = option(
        "Deltas begin as: svd, activation (whitened by inputs), fit, or zero.", default="svd",
        choices=STARTS, noun="start",
    )  # fmt: skip
    align: bool = option("First put neurons in the order of the anchor's.", default=False)
    calibration: str | Path | None = option(
        "Text to train on: a file, datasets:NAME, pages, or self (default), the model's own.",
        default=None, panel=TEXT, old=("train",), old_flags=("--train",),
    )  # fmt: skip
    samples: int | None = option(
        "Samples of text, at most. Default: all; 256 of self.", default=None, panel=TEXT
    )
    max_tokens: int = option("Tokens of a row of text.", default=256, panel=TEXT)
    text: str | Path | Sequence[str | Path] | None = option(
        "Text to measure perplexity and KL on; files also before and after, with --task. "
        "Default: held-out rows.",
        default=None, panel=TEXT, old=("measure", "texts"), old_flags=("--measure",), identity=False,
    )  # fmt: skip
    steps: int = option(
        "Steps of training; 0: none.", default=0, panel=TRAINING, low=0,
        wrong="steps and trials are numbers of 0 or more.",
    )  # fmt: skip
    rate: float = option(
        "Learning rate, at its highest.", default=5e-4, panel=TRAINING, above=0, below=1,
        wrong="rate must be between 0 and 1, not {value}.",
    )  # fmt: skip
    batch: int = option(
        "Rows of text in a step, all processes together.", default=8, panel=TRAINING, low=1,
        wrong="batch-rows must be at least 1, not {value}.",
    )  # fmt: skip
    kl_share: float = option(
        "Share of the loss that is KL from the whole model.", default=0.5, panel=TRAINING, low=0, high=1,
        wrong="kl-share must be between 0 and 1, not {value}.",
    )  # fmt: skip
    temperature: float = option(
        "Temperature of that KL.", default=2.0, panel=TRAINING, above=0,
        wrong="temperature must be above 0, not {value}.",
    )  # fmt: skip
    replace_from: float = option(
        "Probability at which a module begins to be replaced.", default=0.3, panel=TRAINING, low=0, high=1,
        wrong="The schedule's start lies between 0 and 1, and {value:g} does not.",
    )  # fmt: skip
    replace_until: float = option(
        "Share of the steps after which all are replaced.", default=0.5, panel=TRAINING, low=0, high=1,
        wrong="The schedule's until lies between 0 and 1, and {value:g} does not.",
    )  # fmt: skip
    replace_stagger: float = option(
        "Share of that time over which modules begin; the deepest first.", default=0.5, panel=TRAINING,
        low=0, high=0.99,
        wrong="The schedule's stagger lies between 0 and 0.99, and {value:g} does not.",
    )  # fmt: skip
    patience: int = option(
        "Stop after so many looks at held-out text without gain; 0: never.", default=0, panel=TRAINING,
        low=0, wrong="patience must be at least 0, not {value}.",
    )  # fmt: skip
    check_steps: int = option(
        "Steps between looks at held-out text; then work is saved.", default=25, panel=TRAINING, low=1,
        wrong="check-steps must be at least 1, not {value}.",
    )  # fmt: skip
    bf16: bool = option("Run the model in bf16.", default=False, panel=TRAINING)
    recompute: bool = option("Less memory: run each block twice.", default=False, panel=TRAINING)
    tune: str = option(
        "What is trained: delta, or all weights (two models in memory).", default="delta", panel=TRAINING,
        choices=TUNES, noun="tune",
    )  # fmt: skip
    trials: int = option(
        "Try so many settings of the training first, by Optuna.", default=0, panel=TRAINING, low=0,
        wrong="steps and trials are numbers of 0 or more.",
        old=("search",), old_flags=("--search",),
    )  # fmt: skip
    trial_steps: int | None = option(
        "Steps of each try. Default: a quarter of --steps.", default=None, panel=TRAINING,
        old=("search_steps",), old_flags=("--search-steps",),
    )  # fmt: skip
    dense: bool = option(
        "Write the ordinary model that results instead.", default=False, panel=OUTPUT
    )

    def check(self) -> None:
        """What no single field can tell. Raises UsageError."""
        given = sum(each is not None for each in (self.shared, self.rank, self.parameters))
        if given == 3 or (self.parameters is None and given < 2):
            raise UsageError(
                "Say how much is stored: the share of parameters kept (0.88), alone or with one of "
                "shared and rank, or shared (blocks) and rank together."
            )
        if self.method == "drop-mlp" and self.matrices != "mlp":
            raise UsageError(
                "drop-mlp drops MLPs, so it shares no attention; leave out --matrices."
            )
        if self.align and "mlp" not in MATRICES[self.matrices]:
            raise UsageError(
                "Only neurons of MLPs are aligned, and none are shared; leave out --align."
            )
        if self.trials and not self.steps:
            raise UsageError("A search tries numbers of the training; give --steps, too.")
        if self.calibration is not None and not self.steps:
            raise UsageError("There is text to train on but no steps; give --steps (500).")

    @property
    def scales_rows(self) -> bool:
        """Whether anchors are scaled: as asked, else unless a rank is named, which is the paper's form."""
        return self.rank is None if self.row_scale is None else self.row_scale

    @property
    def steps_of_trial(self) -> int:
        """Steps of each try."""
        return self.trial_steps or max(1, self.steps // 4)

    @property
    def measured(self) -> tuple[str | Path, ...]:
        """The texts that quality is measured on."""
        if self.text is None:
            return ()
        return (self.text,) if isinstance(self.text, str | Path) else tuple(self.text)

    @property
    def texts(self) -> tuple[str | Path, ...]:
        """Those of them that are also measured before and after, beside tasks: plain files."""
        return tuple(each for each in self.measured if self.tasks and Path(each).is_file())
