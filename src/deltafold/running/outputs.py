"""What is checked of an output before any work: that it may be written there, and fits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from deltafold.archive import MANIFEST_FILE
from deltafold.errors import StorageError, UsageError


def check_output(output: Path, overwrite: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse an output that exists, unless told to overwrite: then, one that is no model.

    What is overwritten is removed, so it must be an archive or a checkpoint, and none of `inputs`.
    """
    if output.name in ("", ".."):
        raise UsageError(f"{output} names no new folder; choose another output.")
    if not output.exists():
        return
    if not overwrite:
        raise UsageError(f"{output} exists; choose another output or add --overwrite.")
    if not output.is_dir() or not _is_model(output):
        raise UsageError(
            f"{output} is neither an archive nor a checkpoint, so it is not overwritten; choose "
            "another output."
        )
    for source in map(Path, inputs):
        if source.exists() and source.resolve().is_relative_to(output.resolve()):
            raise UsageError(f"{output} is what is read; choose another output.")


def _is_model(folder: Path) -> bool:
    return (
        (folder / MANIFEST_FILE).is_file()
        or next(folder.glob("*.safetensors"), None) is not None
        or next(folder.iterdir(), None) is None
    )


def check_space(output: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise StorageError(
            f"{output} needs about {needed_bytes / 1e9:.2f} GB, and {parent} has "
            f"{free / 1e9:.2f} GB free; free some or choose another output."
        )
