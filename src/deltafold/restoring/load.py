"""An archive on its base in memory: its tensors, or a ready `transformers` model."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from deltafold.archive import Archive, Tensor
from deltafold.calibration.models import config_of, load_weights
from deltafold.checkpoint import open_checkpoint
from deltafold.checkpoint.writer import put_file
from deltafold.dtypes import native
from deltafold.errors import MismatchError
from deltafold.lazy import torch
from deltafold.restoring.decode import (
    assembled,
    check_codecs,
    checked_rows,
    decoded_rows,
    named_tensors,
)
from deltafold.restoring.ground import fitted_base
from deltafold.running.engine import Progress, Task, run_tasks
from deltafold.running.neutral import undisturbed


@undisturbed
def load_state(
    archive: str | Path,
    base: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The restored tensors by checkpoint name, in their stored dtypes and shapes."""
    state: dict[str, torch.Tensor] = {}
    lock = threading.Lock()
    with Archive(Path(archive)) as opened, open_checkpoint(base) as checkpoint:
        check_codecs(opened)
        ground = fitted_base(opened, checkpoint)

        def one(tensor: Tensor) -> None:
            whole = assembled(tensor, checked_rows(opened, tensor, ground))
            with lock:
                state[tensor.name] = native(whole, tensor.dtype)

        tasks = [
            Task(t.name, partial(one, t), 200 << 20, float(torch.Size(t.shape).numel()))
            for t in opened.manifest.tensors
        ]
        run_tasks("load", tasks, workers, None, progress)
        return {tensor.name: state[tensor.name] for tensor in opened.manifest.tensors}


def tensors(
    archive: str | Path, base: str | Path, *, names: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each restored tensor, in the checkpoint's order, one in memory at a time.

    In their stored shapes and dtypes, as `restore` writes them, and checked as `restore` checks: the
    base by its hashes, each part by its checksum, and what comes out by its digest.

    Args:
        names: only these tensors; default: all.

    Raises ArchiveError, MismatchError, and UsageError for a name that the archive does not have.

    >>> for name, tensor in tensors("math.delta", base="base/"):                # doctest: +SKIP
    ...     print(name, tuple(tensor.shape))
    """
    with Archive(Path(archive)) as opened, open_checkpoint(base) as checkpoint:
        check_codecs(opened)
        ground = fitted_base(opened, checkpoint)
        for tensor in named_tensors(opened.manifest, names):
            whole = assembled(tensor, checked_rows(opened, tensor, ground))
            yield tensor.name, native(whole, tensor.dtype)


@contextlib.contextmanager
def archive_weights(
    archive: str | Path, base: str | Path
) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function from a tensor's name to the restored tensor, decoded when asked for.

    The base is not hashed again: this is for an archive that was just made from it.
    """
    with Archive(Path(archive)) as opened, open_checkpoint(base) as checkpoint:
        check_codecs(opened)
        ground = fitted_base(opened, checkpoint)

        def tensor(name: str) -> torch.Tensor:
            entry = opened.by_name[name]
            return assembled(entry, decoded_rows(opened, entry, ground))

        yield tensor


def side_files(archive: str | Path, base: str | Path, folder: Path) -> None:
    """Write config, tokenizer and the like of the fine-tune into `folder`."""
    with Archive(Path(archive)) as opened, open_checkpoint(base) as checkpoint:
        for entry in opened.manifest.files:
            put_file(folder, entry.name, opened.side_file(entry, checkpoint))


def load_archive(
    archive: str | Path,
    base: str | Path,
    *,
    causal: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **from_pretrained: Any,
) -> Any:
    """A ready `transformers` model: the fine-tune of `archive` on `base`, of its own class.

    With `causal` it must be a causal language model. Raises ArchiveError, CheckpointError,
    MismatchError.
    """
    state = load_state(archive, base, workers=workers, progress=progress)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side_files(archive, base, folder)
        if not (folder / "config.json").is_file():
            raise MismatchError(
                f"{archive} carries no config.json, so no model can be built; use restore."
            )
        return model_of(folder, state, str(archive), causal, **from_pretrained)


def model_of(
    folder: Path,
    state: dict[str, torch.Tensor],
    label: str | None = None,
    causal: bool = True,
    **from_pretrained: Any,
) -> Any:
    """A ready `transformers` model of a folder's config and of tensors in memory, in their shapes.

    Raises CheckpointError, MismatchError.
    """
    from transformers import GenerationConfig

    label = label or str(folder)
    options = {"dtype": "auto"} | from_pretrained
    model = load_weights(config_of(folder, label), state, label, causal=causal, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return model
