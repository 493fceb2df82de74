"""An archive on its base in memory: its tensors, or a ready `transformers` model."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltafold.archive import Archive, Tensor
from deltafold.checkpoint import open_checkpoint
from deltafold.dtypes import native
from deltafold.errors import MismatchError
from deltafold.lazy import torch
from deltafold.restoring.decode import (
    assembled,
    check_base_headers,
    check_codecs,
    checked_rows,
    decoded_rows,
)
from deltafold.running.engine import Progress, Task, run_tasks
from deltafold.running.neutral import as_at_start


@as_at_start
def load_state(
    archive: str | Path,
    base: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The restored tensors by checkpoint name, in their stored dtypes."""
    state: dict[str, torch.Tensor] = {}
    lock = threading.Lock()
    with Archive(Path(archive)) as opened, open_checkpoint(base) as checkpoint:
        check_codecs(opened)
        check_base_headers(opened, checkpoint)

        def one(tensor: Tensor) -> None:
            whole = assembled(tensor, checked_rows(opened, tensor, checkpoint))
            with lock:
                state[tensor.name] = native(whole, tensor.dtype)

        tasks = [
            Task(t.name, lambda t=t: one(t), 200 << 20, float(torch.Size(t.shape).numel()))  # type: ignore[misc]
            for t in opened.manifest.tensors
        ]
        run_tasks("load", tasks, workers, None, progress)
        return {tensor.name: state[tensor.name] for tensor in opened.manifest.tensors}


@contextlib.contextmanager
def archive_weights(
    archive: str | Path, base: str | Path
) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function from a tensor's name to the restored tensor, decoded when asked for.

    The base is not hashed again: this is for an archive that was just made from it.
    """
    with Archive(Path(archive)) as opened, open_checkpoint(base) as checkpoint:
        check_codecs(opened)
        check_base_headers(opened, checkpoint)

        def tensor(name: str) -> torch.Tensor:
            entry = opened.by_name[name]
            return assembled(entry, decoded_rows(opened, entry, checkpoint))

        yield tensor


def side_files(archive: str | Path, base: str | Path, folder: Path) -> None:
    """Write config, tokenizer and the like of the fine-tune into `folder`."""
    with Archive(Path(archive)) as opened, open_checkpoint(base) as checkpoint:
        for entry in opened.manifest.files:
            (folder / entry.name).write_bytes(opened.side_file(entry, checkpoint))


def load_archive(
    archive: str | Path,
    base: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    **from_pretrained: Any,
) -> Any:
    """A ready `transformers` model: the fine-tune of `archive` on `base`.

    Raises ArchiveError, MismatchError.
    """
    state = load_state(archive, base, workers=workers, progress=progress)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side_files(archive, base, folder)
        if not (folder / "config.json").is_file():
            raise MismatchError(
                f"{archive} carries no config.json, so no model can be built; use restore."
            )
        return model_of(folder, state, **from_pretrained)


def model_of(folder: Path, state: dict[str, torch.Tensor], **from_pretrained: Any) -> Any:
    """A ready `transformers` model of a folder's config and of tensors in memory."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    model = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, **({"dtype": "auto"} | from_pretrained)
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return model


def _model_class(config: Any) -> Any:
    """The causal language model class of a configuration (the auto class wants a folder)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MismatchError(
            f"transformers has no causal language model for {config.model_type!r}; use restore."
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
