"""What `compress` and `plan` are asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from deltafold.running.common import Clustered, Pair, Scored, Seeded, Writing
from deltafold.running.request import (
    OUTPUT,
    SIZE,
    TEXT,
    TRAINING,
    WHAT,
    Request,
    argument,
    asked,
    option,
    parse_bytes,
)


@asked
class Budgeted(Request):
    """An archive of a size: what is asked of it, and settings of the method's own."""

    file_ratio: float | None = option(
        "Checkpoint bytes / archive bytes, all files counted. Default: 32.",
        default=None, panel=SIZE, identity=False,
    )  # fmt: skip
    nominal_ratio: float | None = option(
        "The papers' ratio: values of linear layers only, scales and positions free.",
        default=None, identity=False, panel=SIZE,
    )  # fmt: skip
    n_bytes: float | None = option(
        "Size of the archive, e.g. 8MB or 120000.",
        identity=False,
        default=None,
        panel=SIZE,
        flag="--bytes",
        parse=parse_bytes,
    )
    method_settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The method's own, e.g. `beta=0.6`; in Python plain keywords."""

    @property
    def budget(self) -> tuple[float | None, float | None, float | None]:
        """What `budget_of` takes."""
        return self.file_ratio, self.nominal_ratio, self.n_bytes

    @property
    def open_settings(self) -> list[str]:
        """Settings given as `auto`: chosen by measuring."""
        return [name for name, value in self.method_settings.items() if value == "auto"]


@asked
class PlanRequest(Budgeted, Pair):
    """Show what compress would do, from headers alone: roles, sizes, what does not match.

    Returns tensors by role, what does not match, bytes expected (an upper bound where the weights
    decide: equal tensors will cost nothing), memory and disk needed. Raises what `compress` raises for
    inputs that cannot work.
    """

    method: str = argument(
        "A codec, see `methods`.",
        default="auto",
        kw_only=False,
        flag="--method",
        flags=("-m",),
        panel=WHAT,
    )


@asked
class MethodsRequest(Request):
    """List the codecs: what each is, where it comes from, its bits per weight at a ratio of 32.

    Returns one row a codec; bits are the true ones stored of a matrix of `shape` at nominal ratio 32. For
    codecs that look at singular values, those of the example fall off as 1 / sqrt(index).
    """

    shape: tuple[int, int] = option(
        "Rows and columns of the matrix that bits are counted for.", default=(2048, 2048), cli=False
    )


@asked
class CompressRequest(Budgeted, Clustered, Scored, Seeded, Writing, Pair):
    """Compress a fine-tuned checkpoint against its base into an archive.

    Keywords that are not listed are the method's own settings, e.g. `beta=0.6, c="auto"`. Returns the
    record. Raises DeltafoldError (see `deltafold.errors`); nothing is left under `output` then.

    Example: deltafold compress base/ math/ -o math.delta --file-ratio 64
    """

    output: str | Path = argument(
        "Archive folder to write.", kw_only=False, flag="--output", flags=("-o",), panel=OUTPUT
    )
    method: str = argument(
        "Codec for the large matrices; see `methods`.",
        default="auto", kw_only=False, flag="--method", flags=("-m",), panel=WHAT, identity=True, record=True,
    )  # fmt: skip
    fallback: bool = option(
        "Let a tensor that the method does not suit be stored by one that suits it.", default=True
    )
    as_given: bool = option(
        "Base and fine-tune are not swapped, though they look like it.",
        default=False,
        identity=False,
    )
    kl_at_most: float | None = option(
        "Instead of a size: the smallest archive whose KL to the fine-tune stays at or below this "
        "many nats a token.",
        default=None, panel=SIZE, identity=False,
    )  # fmt: skip
    calibration: str | Path | None = option(
        "Text that shows what errors cost, and KL is measured on: JSONL of prompts (and answers), "
        "plain text, datasets:NAME, self (the fine-tune writes it), general (comes with deltafold; "
        "what auto takes by default) or none.",
        default=None, panel=TEXT, metavar="TEXT", identity=False, old_flags=("--text",),
    )  # fmt: skip
    samples: int = option("Calibration samples, at most.", default=128, panel=TEXT, identity=False)
    max_tokens: int = option(
        "Tokens of a calibration sample.", default=256, panel=TEXT, identity=False
    )
    steps: int = option(
        "Steps of training what is stored against the fine-tune's outputs; 0: none.",
        default=0, panel=TRAINING, identity=False, old=("distill",), old_flags=("--distill",),
    )  # fmt: skip
