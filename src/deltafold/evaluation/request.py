"""What `evaluate` is asked, and what every measurement is: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltafold.errors import UsageError
from deltafold.running.common import Answered, ModelsAlone
from deltafold.running.request import (
    OUTPUT,
    TEXT,
    argument,
    asked,
    option,
    options_of,
    plain,
)


@asked
class Measuring(Answered):
    """What is measured of a model, and how. Raises UsageError where that is nothing."""

    texts: Sequence[str | Path] = option(
        "A UTF-8 text for perplexity and KL.", default=(), panel=TEXT, flag="--text"
    )
    lm_eval: Sequence[str] = option(
        "Tasks of lm-evaluation-harness.", default=(), panel=TEXT, metavar="TASK,..."
    )
    lm_eval_path: str | Path | None = option(
        "Your own task files for lm-eval.", default=None, panel=TEXT, metavar="DIR"
    )
    max_length: int | None = option(
        "Tokens of a window of text. Default: 512, or the limit of the model.",
        default=None, panel=TEXT, low=2,
    )  # fmt: skip
    max_new_tokens: int | None = option(
        "Tokens generated. Default: those of the longest answer, and 8.",
        default=None,
        panel=TEXT,
        low=1,
    )

    def check(self) -> None:
        """Raises UsageError."""
        for name in ("tasks", "texts"):  # as a record says them
            object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        if not (self.tasks or self.texts or self.lm_eval):
            raise UsageError("There is nothing to measure; give a --text, a --task or --lm-eval.")

    @property
    def harness_tasks(self) -> list[str]:
        """Names of lm-evaluation-harness, each alone."""
        return [name for names in self.lm_eval for name in names.split(",") if name]

    def measured(self) -> dict[str, Any]:
        """What the record says was measured."""
        found = {name: plain(getattr(self, name)) for name in options_of(Measuring)}
        return found | {"lm_eval": self.harness_tasks}


@asked
class EvaluateRequest(ModelsAlone, Measuring):
    """Measure base, fine-tune and candidates under one setting: perplexity, KL, exact match.

    Every model gets the same tokens, dtype, batch size and device. Figures come with standard errors. A
    model is a Hugging Face folder or an archive. At most two are in memory at a time: the fine-tune, and
    the one that is compared with it. Returns the record. Raises DeltafoldError.

    Example: deltafold evaluate math/ restored/ --base base/ --task sums.jsonl --text wiki.txt
    """

    finetuned: str | Path = argument(
        "The fine-tune: what the others are compared with.", kw_only=False
    )
    models: Sequence[str | Path] = argument(
        "Restored folders, other models, archives.", default=(), kw_only=False, metavar="MODEL"
    )
    base: str | Path | None = argument(
        "The base; becomes a row of its own. Archives need it.",
        default=None, kw_only=False, flag="--base",
    )  # fmt: skip
    record: str | Path | None = option("Write the record to this file.", default=None, panel=OUTPUT)
    report: Callable[[str], None] | None = option(
        "Called with a line as the work goes on.", default=None, cli=False
    )

    def check(self) -> None:
        """Raises UsageError."""
        if self.record is not None and not (folder := Path(self.record).parent).is_dir():
            raise UsageError(f"{folder} is not a folder; make it, or give another --record.")
        super().check()

    @classmethod
    def former(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call as of before, with tasks and texts by place."""
        return args[:3], {**kwargs, **dict(zip(("tasks", "texts"), args[3:], strict=False))}
