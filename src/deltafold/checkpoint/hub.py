"""From what a user types to a local folder: a path, or a hub id with an optional `@revision`."""

from __future__ import annotations

import re
from pathlib import Path

from deltafold.checkpoint.view import SIDE_FILE_PATTERNS, Checkpoint
from deltafold.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def local_folder(source: str | Path) -> Path:
    """The folder (or file) that `source` names, downloaded first if it is a hub id.

    Only safetensors and side files are fetched, never pickles. Raises CheckpointError.
    """
    path = Path(source).expanduser()
    text = str(source)
    if text and path.exists():
        return path
    if not _HUB_ID.fullmatch(text) or text.count("/") != 1 + text.partition("@")[2].count("/"):
        raise CheckpointError(
            f"{text} does not exist; give a local Hugging Face folder or a hub id like org/name."
        )
    repo, _, revision = text.partition("@")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.safetensors.index.json", *SIDE_FILE_PATTERNS],
            )
        )
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        raise CheckpointError(
            f"{text} is not a local folder, and the hub did not give it "
            f"({type(error).__name__}); check the name, your network and your login."
        ) from error


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local folder, a safetensors file or a hub id."""
    return Checkpoint(local_folder(source), label=str(source))
