"""What lies beside a model's weights, written beside the weights of what was made of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from deltafold.checkpoint.contents import is_index
from deltafold.checkpoint.view import Checkpoint
from deltafold.checkpoint.writer import guard_storage, put_file


def write_beside(checkpoint: Checkpoint, folder: Path, changed: Mapping[str, bytes]) -> None:
    """Every small file of `checkpoint` into `folder`; those in `changed` with another content.

    An index of the folder's own weights is left to the writer of weights. Raises StorageError.
    """
    for file in checkpoint.side_files:
        name = checkpoint.relative(file)
        if not is_own_index(name):
            put_file(folder, name, changed[name] if name in changed else checkpoint.side_file(file))


def copy_beside(folder: Path, target: Path, replace: bool = False) -> None:
    """All of `folder` but its own weights into `target`, which has its own already.

    Weights in folders inside come along. What `target` has stays, but with `replace`. Raises
    StorageError.
    """
    with Checkpoint(folder) as checkpoint:
        inner = [folder / name for name in dict.fromkeys(checkpoint.inner_files.values())]
        for file in [*checkpoint.side_files, *inner]:
            name = checkpoint.relative(file)
            if not is_own_index(name) and (replace or not (target / name).exists()):
                guard_storage(target / name, partial(_copy, file, target / name))


def is_own_index(name: str) -> bool:
    """True for an index of weights that lie in the folder itself, not in one inside."""
    return "/" not in name and is_index(name)


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, target)
