"""What `push` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from deltafold.errors import UsageError
from deltafold.running.request import OUTPUT, WHAT, Request, argument, asked, option

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@asked
class PushRequest(Request):
    """Push an archive or a checkpoint to the Hugging Face Hub, with a card written from its record.

    The repository and the branch are made if need be, and all files go in one commit. A checkpoint's own
    README.md is kept. Files of an earlier push that no longer belong are removed. The record itself
    stays here: it holds folders of this machine. Returns `url`, `commit`, `files` (names) and `n_bytes`.
    Raises UsageError, HubError, and ArchiveError or CheckpointError where `source` is not whole.

    Example: deltafold push math.delta me/math-delta --private
    """

    source: str | Path = argument(
        "An archive, or a checkpoint folder.", kw_only=False, metavar="FOLDER"
    )
    repo: str = argument(
        "Where on the hub; @BRANCH for a branch.", kw_only=False, metavar="OWNER/NAME"
    )
    private: bool = option("Make the repository private, if it is made.", default=False, panel=WHAT)
    license: str | None = option(
        "For the card, e.g. apache-2.0. Default: what the fine-tune's or the base's card says.",
        default=None, panel=WHAT,
    )  # fmt: skip
    record: str | Path | None = option(
        "The run's record, for the card. Default: the one beside it.", default=None, panel=WHAT
    )
    message: str | None = option("Of the commit.", default=None, panel=OUTPUT)

    def check(self) -> None:
        """Raises UsageError."""
        if not _REPO.fullmatch(self.repo):
            raise UsageError(f"{self.repo!r} is no name on the hub; write it like owner/name.")
