"""`push_to_hub`: an archive, or a checkpoint that deltafold wrote, becomes a repository of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from deltafold.archive import MANIFEST_FILE, Archive
from deltafold.archive.reader import FILES_FOLDER
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.contents import INDEX_FILE
from deltafold.checkpoint.hub import (
    ARCHIVE_PATTERNS,
    CHECKPOINT_PATTERNS,
    FETCHED_PATTERNS,
    unreachable,
)
from deltafold.errors import DeltafoldError, HubError, UsageError
from deltafold.foreign import blamed
from deltafold.publishing.card import card, license_of
from deltafold.publishing.request import PushRequest
from deltafold.restoring.named import names_of
from deltafold.running.front import front
from deltafold.running.record import Record, read_record

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Parcel:
    """What is pushed: files by their name in the repository, and what the card tells."""

    archive: bool
    files: dict[str, Path]
    base: str
    finetuned: str


def run_push(request: PushRequest) -> dict[str, Any]:
    """What is asked, sent; see `PushRequest`."""
    name, _, branch = request.repo.partition("@")
    source = Path(request.source).expanduser()
    parcel, known = packed(source), _record(source, request.record)
    text = None
    if CARD_FILE not in parcel.files:
        chosen = request.license or license_of(parcel.finetuned, parcel.base)
        text = card(name, parcel.archive, parcel.base, known, chosen)
    try:
        return _send(name, branch or None, parcel, text, request.private, request.message)
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        raise blamed(error, HubError(_why_not(name, error))) from error


push_to_hub = front("push_to_hub", PushRequest, run_push)


def packed(folder: Path) -> Parcel:
    """The files that belong, and no others. Raises UsageError, ArchiveError, CheckpointError."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give an archive or a checkpoint folder.")
    if (folder / MANIFEST_FILE).is_file():
        with Archive(folder) as archive:
            manifest = archive.manifest
            names = [MANIFEST_FILE, *(entry.name for entry in manifest.payload)]
            names += [
                f"{FILES_FOLDER}/{entry.name}.zst"
                for entry in manifest.files
                if entry.stored != "base"
            ]
            files = {name: folder / name for name in names}
            return Parcel(True, files, *names_of(archive))
    checkpoint = Checkpoint(folder)
    checkpoint.close()
    found = [*checkpoint.shards, *checkpoint.side_files]
    if (folder / INDEX_FILE).is_file():
        found.append(folder / INDEX_FILE)
    # What is public is what readers fetch; notes that lie about in a folder stay there.
    files = {
        checkpoint.relative(file): file
        for file in found
        if any(fnmatch(checkpoint.relative(file), pattern) for pattern in FETCHED_PATTERNS)
    }
    return Parcel(False, files, *_origins(folder))


def _origins(folder: Path) -> tuple[str, str]:
    """(base, fine-tune) of a checkpoint that a run wrote, as far as its record tells."""
    try:
        known = read_record(folder)
    except DeltafoldError:
        return "", ""
    return str(known.get("base") or known.get("model") or ""), str(known.get("finetuned") or "")


def _record(folder: Path, given: str | Path | None) -> Record | None:
    """The record given, or the one beside the folder; None without."""
    if given is not None:
        return read_record(Path(given))
    try:
        return read_record(folder)
    except DeltafoldError:
        return None


def _send(
    repo: str,
    branch: str | None,
    parcel: Parcel,
    text: str | None,
    private: bool,
    message: str | None,
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise HubError("The hub does not know you; log in with hf auth login, or set HF_TOKEN.")
    api = HfApi(library_name="deltafold")
    api.create_repo(repo, private=private or None, exist_ok=True)
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)
    contents: dict[str, Path | bytes] = dict(parcel.files)
    if text is not None:
        contents[CARD_FILE] = text.encode()
    there = api.list_repo_files(repo, revision=branch)
    operations: list[Any] = [
        CommitOperationAdd(name, str(held) if isinstance(held, Path) else held)
        for name, held in contents.items()
    ]
    operations += [CommitOperationDelete(name) for name in stale(there, list(contents))]
    made = api.create_commit(
        repo, operations, commit_message=message or "Push by deltafold", revision=branch
    )
    sizes = [h.stat().st_size if isinstance(h, Path) else len(h) for h in contents.values()]
    return {
        "url": f"{api.endpoint}/{repo}",
        "commit": made.oid,
        "files": sorted(contents),
        "n_bytes": sum(sizes),
    }


def stale(there: Sequence[str], pushed: Sequence[str]) -> list[str]:
    """Files of an earlier push that are not among these: weights, parts, side files.

    >>> stale(["payload-00002-of-00002.safetensors", "notes.md"], ["delta.json"])
    ['payload-00002-of-00002.safetensors']
    """
    ours = (*ARCHIVE_PATTERNS, *CHECKPOINT_PATTERNS)
    return sorted(
        name
        for name in there
        if name not in pushed and any(fnmatch(name, pattern) for pattern in ours)
    )


def _why_not(repo: str, error: Exception) -> str:
    if reason := unreachable(error):
        return f"{repo} was not pushed: {reason}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    owner = repo.partition("/")[0]
    match status:
        case 401:
            return "The hub does not accept your token; log in with hf auth login, or set HF_TOKEN."
        case 403:
            return (
                f"You may not write to {repo}; check that {owner} is you or an organization of "
                "yours, and that your token may write."
            )
        case 404:
            return f"{repo} was not pushed: the hub has no such owner or branch; check {owner}."
    first = str(error).strip().splitlines()
    told = f": {first[0]}" if first else ""
    return f"{repo} was not pushed ({type(error).__name__}{told}); run the same command again."
