"""From what a user types to a local folder: a path, a hub id (`org/name@revision`), an address."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from deltafold.checkpoint.kinds import refuse_other_kinds
from deltafold.checkpoint.store import Remote, is_address, shown
from deltafold.checkpoint.view import SIDE_FILE_PATTERNS, Checkpoint
from deltafold.errors import CheckpointError
from deltafold.foreign import blamed

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
ARCHIVE_PATTERNS = ("delta.json", "payload-*.safetensors", "files/*.zst")
# In each a star stands for folders too.
CHECKPOINT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", *SIDE_FILE_PATTERNS)
# What may belong to a model besides; a repository also holds data, pictures and other formats.
FETCHED_PATTERNS = (
    *CHECKPOINT_PATTERNS, "*.json", "*.jinja", "*.jinja2", "*.txt", "*.tiktoken", "*.spm", "*.codes",
    "*.bpe", "*.vocab", "*.yaml", "*.yml", "*.toml", "*.npy", "*.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


def is_hub_id(source: str | Path) -> bool:
    """Whether this is written like `owner/name` or `owner/name@revision`."""
    text = str(source)
    return bool(_HUB_ID.fullmatch(text)) and text.count("/") == 1 + text.partition("@")[2].count(
        "/"
    )


def local_folder(source: str | Path) -> Path:
    """The folder (or file) that `source` names; a hub id or an address is downloaded first.

    A checkpoint or an archive. Only safetensors and side files are fetched, never pickles. Raises
    CheckpointError.
    """
    path = Path(source).expanduser()
    if str(source) and path.exists():
        return path
    if is_address(source):
        return Remote.at(source).fetch([*FETCHED_PATTERNS, *ARCHIVE_PATTERNS])
    if not is_hub_id(source):
        raise CheckpointError(
            f"{source} does not exist; give a local Hugging Face folder or a hub id like org/name."
        )
    return _downloaded(str(source), [*FETCHED_PATTERNS, *ARCHIVE_PATTERNS])


def archive_folder(source: str | Path) -> Path:
    """The folder of an archive: a local one as it is named; a hub id or an address is downloaded.

    Raises CheckpointError where hub or store do not give it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if is_address(source):
        return Remote.at(source).fetch(ARCHIVE_PATTERNS)
    return _downloaded(str(source), ARCHIVE_PATTERNS) if is_hub_id(source) else path


def _downloaded(hub_id: str, patterns: Sequence[str]) -> Path:
    repo, _, revision = hub_id.partition("@")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns))
        )
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        raise blamed(error, CheckpointError(_why_not(hub_id, error))) from error


def _why_not(hub_id: str, error: Exception) -> str:
    if reason := unreachable(error):
        return f"{hub_id} is not a local folder, and {reason}"
    match type(error).__name__:
        case "RevisionNotFoundError":
            return f"{hub_id}: the hub has no such revision; check what stands after the @."
        case "RepositoryNotFoundError" | "GatedRepoError":
            return (
                f"{hub_id} is not a local folder, and the hub did not give it: there is no such "
                "repository, or you may not see it; check the name, or log in with hf auth login."
            )
    return (
        f"{hub_id} is not a local folder, and the hub did not give it ({type(error).__name__}); "
        "check the name, your network and your login."
    )


def unreachable(error: Exception | None) -> str | None:
    """Why the hub cannot be reached, where an error or one of its causes says that; else None."""
    seen = 0
    while error is not None and seen < 8:
        name = type(error).__name__
        if name == "OfflineModeIsEnabled":
            return "the hub is switched off here; unset HF_HUB_OFFLINE."
        if name in (
            "ConnectError",
            "ConnectTimeout",
            "ReadTimeout",
            "ProxyError",
            "ConnectionError",
        ):
            return f"the hub cannot be reached ({name}); check your network."
        error, seen = error.__cause__ or error.__context__, seen + 1  # type: ignore[assignment]
    return None


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local folder, a safetensors file, a hub id or an address.

    Raises CheckpointError, also for what is no checkpoint: an archive, an adapter.
    """
    path = local_folder(source)
    refuse_other_kinds(path, shown(source))
    return Checkpoint(path, label=shown(source))
