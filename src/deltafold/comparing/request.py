"""What `compare` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

from deltafold.errors import UsageError
from deltafold.running.common import ModelsAlone, OfArchive, Pair
from deltafold.running.request import TEXT, WHERE, asked, option


@asked
class CompareRequest(ModelsAlone, OfArchive, Pair):
    """Ask base, fine-tune and what an archive restores the same thing, side by side.

    Example: deltafold compare base/ math/ math.delta --prompt "12 + 7 ="
    """

    more_help = (
        "Opens a page on this machine (needs deltafold[compare]); --prompt answers in the terminal."
    )

    prompt: Sequence[str] = option(
        "Answer this in the terminal, without a page.", default=(), panel=TEXT
    )
    max_new_tokens: int = option(
        "Tokens of an answer, at most.", default=64, panel=TEXT, low=1,
        wrong="{value} tokens are too few; ask for at least 1.",
    )  # fmt: skip
    chat: bool = option(
        "Put prompts into the fine-tune's chat template.", default=False, panel=TEXT
    )
    port: int | None = option(
        "Of the page. Default: the first free one from 7860.",
        default=None, panel=WHERE, low=1, high=65535,
    )  # fmt: skip

    def check(self) -> None:
        """Raises UsageError."""
        for text in self.prompt:
            check_prompt(text)


def check_prompt(text: str) -> None:
    """Raises UsageError for an empty one."""
    if not text.strip():
        raise UsageError("The prompt is empty; type something for the models to go on from.")
