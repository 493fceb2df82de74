"""A model to merge: a checkpoint, or an archive that is decoded tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from deltafold.archive import Archive, is_archive
from deltafold.checkpoint import Checkpoint, open_checkpoint
from deltafold.checkpoint.json_files import parse_object
from deltafold.restoring.decode import assembled, check_codecs, checked_rows
from deltafold.restoring.ground import fitted_base

Header = tuple[str, tuple[int, ...]]
"""(dtype as in headers, shape)"""


class Source(Protocol):
    """Tensors of one model."""

    label: str
    headers: dict[str, Header]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in its stored dtype and shape. Raises ArchiveError, MismatchError."""
        ...

    @property
    def left_out(self) -> list[dict[str, object]]:
        """Files that are not taken along."""
        ...

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        """Config, tokenizer and the like: (name, content)."""
        ...

    def fingerprint(self) -> object:
        """What unfinished work is bound to."""
        ...

    def close(self) -> None: ...


class CheckpointSource:
    """A folder, a file or a hub id."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.label = checkpoint, checkpoint.label
        self.headers = {n: (info.dtype, info.shape) for n, info in checkpoint.tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in its stored dtype and shape."""
        return self.checkpoint.tensor(name)

    @property
    def left_out(self) -> list[dict[str, object]]:
        return self.checkpoint.left_out

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        for path in self.checkpoint.side_files:
            yield self.checkpoint.relative(path), self.checkpoint.side_file(path)

    def fingerprint(self) -> object:
        return self.checkpoint.fingerprint()

    def close(self) -> None:
        self.checkpoint.close()


class ArchiveSource:
    """An archive on its base; the base's tensors are hashed before they are used."""

    def __init__(self, folder: Path, base: Checkpoint):
        self.archive = Archive(folder)
        try:
            check_codecs(self.archive)
            self.base = fitted_base(self.archive, base)
        except BaseException:
            self.archive.__exit__()
            raise
        self.label = str(folder)
        self.headers = {t.name: (t.dtype, t.shape) for t in self.archive.manifest.tensors}

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, restored, in its stored dtype and shape."""
        entry = self.archive.by_name[name]
        return assembled(entry, checked_rows(self.archive, entry, self.base))

    @property
    def left_out(self) -> list[dict[str, object]]:
        return []

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        for entry in self.archive.manifest.files:
            yield entry.name, self.archive.side_file(entry, self.base)

    def fingerprint(self) -> object:
        return self.archive.identity

    def close(self) -> None:
        self.archive.__exit__()


class Renamed:
    """A source under other headers: a tensor hidden, or one that goes by two names."""

    def __init__(
        self, source: Source, hidden: str | None = None, twin: tuple[str, str] | None = None
    ):
        self._source, self.label = source, source.label
        self._twins = dict([twin] if twin else [])
        self.headers = {name: each for name, each in source.headers.items() if name != hidden}
        self.headers |= {new: source.headers[old] for new, old in self._twins.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, by the base's name for it, in its stored dtype and shape."""
        return self._source.tensor(self._twins.get(name, name))

    @property
    def left_out(self) -> list[dict[str, object]]:
        return self._source.left_out

    def side_files(self) -> Iterator[tuple[str, bytes]]:
        return self._source.side_files()

    def fingerprint(self) -> object:
        return self._source.fingerprint()

    def close(self) -> None:
        self._source.close()


def open_source(path: str | Path, base: Checkpoint) -> Source:
    """An archive's folder, or any checkpoint. Raises CheckpointError, ArchiveError, MismatchError."""
    if is_archive(path):
        return ArchiveSource(Path(path), base)
    return CheckpointSource(open_checkpoint(path))


def config_of(label: str, files: dict[str, bytes]) -> dict[str, Any]:
    """`config.json` of a model's side files; empty if there is none. Raises CheckpointError."""
    return parse_object(files.get("config.json", b"{}"), f"config.json of {label}")
