"""Unfinished work on disk: a folder `NAME.partial` beside the output, with a journal.

The journal names the inputs and settings that the work belongs to. The same command goes on where
it stopped; another one is refused. Results land by rename, so that what is there is whole. When all
is in place the output gets its final name by one rename, and the rest is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from deltafold.archive import TensorDigest
from deltafold.checkpoint import DTYPE_NAMES, Checkpoint, tensor_bytes
from deltafold.checkpoint.header import build_header
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import ResumeError, StorageError, UsageError

JOURNAL = "journal.json"


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


class Workspace:
    """The working folder of one output. Use as a context manager: it holds a lock.

    On success call `publish`; on DeltafoldError call nothing: finished results stay for resuming.
    """

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool = False):
        self.output = output
        self.folder = partial_path(output)
        self.identity = json.loads(json.dumps(identity))
        self.resumed = False
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        guard_storage(self.folder, lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"Another deltafold is writing {self.output} right now; wait for it or choose "
                "another output."
            ) from None
        self._open_journal()
        return self

    def _open_journal(self) -> None:
        path = self.folder / JOURNAL
        if not path.is_file():
            self._write_text(path, json.dumps(self.identity, indent=1) + "\n")
            return
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = {}
        if found != self.identity:
            changed = sorted(
                key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key)
            )
            raise ResumeError(
                f"{self.folder} holds unfinished work begun with other inputs or settings "
                f"({', '.join(changed)}); give the same ones, or --restart to begin anew."
            )
        self.resumed = True

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def save_json(self, name: str, value: object) -> None:
        self._write_text(self.folder / name, json.dumps(value))

    def load_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors (sorted by name) as one safetensors file, by rename."""
        specs = [(k, DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in sorted(tensors.items())]
        header, _ = build_header(specs, None)
        path = self.folder / name
        working = path.with_name(path.name + ".tmp")

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with working.open("wb") as out:
                out.write(header)
                for key, _, _ in specs:
                    out.write(tensor_bytes(tensors[key]))
            working.replace(path)

        guard_storage(path, write)

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        with Checkpoint(self.folder / name) as file:
            return {key: file.tensor(key) for key in file.tensors}

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).unlink()

    def _write_text(self, path: Path, text: str) -> None:
        working = path.with_name(path.name + ".tmp")

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            working.write_text(text)
            working.replace(path)

        guard_storage(path, write)

    def publish(self, finished: str, overwrite: bool = False) -> None:
        """Rename the sub-folder `finished` to the output and remove the rest."""
        if overwrite and self.output.exists():
            old = self.output.with_name(self.output.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            self.output.replace(old)
        else:
            old = None
        guard_storage(self.output, lambda: (self.folder / finished).replace(self.output))
        shutil.rmtree(self.folder)
        if old is not None:
            shutil.rmtree(old)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless told to overwrite."""
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; choose another output or add --overwrite.")
    if overwrite and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is not a folder; choose another output.")


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


def checksum(tensor: torch.Tensor) -> str:
    """Checksum of one part as the manifest holds it."""
    digest = TensorDigest(DTYPE_NAMES[tensor.dtype], tensor.shape)
    digest.update(tensor_bytes(tensor))
    return digest.checksum()
