"""Unfinished work on disk: a folder `NAME.partial` beside the output, with a journal.

The journal names the inputs and settings that the work belongs to. The same command goes on where
it stopped; another one is refused. Results are sealed files (`checkpoint/sealed.py`): one that was
damaged since is made again. When all is in place the output gets its final name by one rename, and
the rest is removed.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from deltafold.archive import TensorDigest
from deltafold.checkpoint import DTYPE_NAMES, CheckpointWriter, disk, sealed, tensor_bytes
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import (
    ResumeError,
    StorageError,
    StorageWarning,
    not_shared,
)
from deltafold.lazy import torch
from deltafold.running import devices
from deltafold.running.folders import WorkFolder
from deltafold.running.locks import LOCK

JOURNAL = "journal.json"
WORD = "partial"
PATIENCE_SECONDS = 60.0  # a network file system may say so long that a file is not there


def partial_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.{WORD}")


class Workspace(WorkFolder):
    """The working folder of one output. Use as a context manager: it holds a lock.

    On success call `publish`. Otherwise finished results stay for resuming, unless the error is one
    that the same command can never get past (a wrong base, an impossible budget).

    Pickled, it goes to other processes, on this or other machines: they read and write results, but
    hold no lock and decide nothing.
    """

    first = JOURNAL

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool = False):
        super().__init__(output, WORD)
        self.identity = json.loads(json.dumps(identity | devices.identity()))
        self.resumed = False
        self.restart = restart
        self._later: disk.Later | None = None  # without it, each file is synced at once
        self._shared = False  # others read and write here, too

    def __reduce__(self) -> tuple[Callable[..., Workspace], tuple[Any, ...]]:
        self._shared = True
        return Workspace._join, (self.output.absolute(), self.identity)

    @classmethod
    def _join(cls, output: Path, identity: dict[str, Any]) -> Workspace:
        """The workspace that another process has opened. Raises ClusterError if it is not there."""
        found = cls(output, identity)
        found._shared = True
        try:
            same = sealed.load_json(found.folder / JOURNAL) == identity
        except StorageError:
            same = False
        if not same:
            raise not_shared(found.folder)
        return found

    def opened(self) -> None:
        """Go on with what the journal is of, or begin. Raises ResumeError."""
        self._later = disk.Later(self.folder)
        path = self.folder / JOURNAL
        if not self.restart and self._holds_work():
            if path.exists() and self._goes_on(path):
                self.resumed = True
                return
            said = "damaged or of another version" if path.exists() else "missing"
            warnings.warn(
                f"{path} is {said}, so nobody knows what the work beside it was; it is begun anew.",
                StorageWarning,
                stacklevel=4,
            )
        guard_storage(self.folder, self._clear)
        sealed.save_json(path, self.identity)
        guard_storage(self.folder, partial(disk.sync_named, [self.folder], self.output.parent))

    def _holds_work(self) -> bool:
        begun = f"{JOURNAL}."  # a journal that did not come to its name
        names = (each.name for each in self.folder.iterdir())
        return any(name != LOCK and not name.startswith(begun) for name in names)

    def _goes_on(self, path: Path) -> bool:
        """Whether the journal is of this very work; False where it cannot be read."""
        if not sealed.fits(path):
            if self.begun:
                return False
            raise ResumeError(
                f"{path} is no journal that can be read; move {self.folder} away, or give "
                "--restart to clear it and begin anew."
            )
        found = sealed.load_json(path)
        if found != self.identity:
            changed = sorted(
                key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key)
            )
            raise ResumeError(
                f"{self.folder} holds unfinished work begun with other inputs or settings "
                f"({', '.join(changed)}); give the same ones, or --restart to begin anew."
            )
        return True

    def _clear(self) -> None:
        """All goes but the lock, the journal last."""
        for item in self.folder.iterdir():
            if item.name not in (LOCK, JOURNAL):
                disk.remove(item)
        disk.sync(self.folder)
        disk.remove(self.folder / JOURNAL)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._later is not None:
            self._later.close()
        sealed.forget(self.folder)
        super().__exit__(kind, error, trace)

    def has(self, name: str) -> bool:
        """Whether a result is there, and is what was saved. What is damaged is said, and removed."""
        return sealed.take_up(self.folder / name)

    def save_json(self, name: str, value: object, of: Iterable[str] = ()) -> None:
        """Save a JSON value. It is there only together with the files that it speaks `of`."""
        bound = [self.folder / each for each in of]
        sealed.save_json(self.folder / name, value, bound, self._later)

    def load_json(self, name: str) -> Any:
        """Raises StorageError if it is missing or damaged."""
        return sealed.load_json(self._found(name))

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors of any shape (sorted by name) as one safetensors file, by rename."""
        ordered = dict(sorted(tensors.items()))
        sealed.save_tensors(self.folder / name, ordered, later=self._later)

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a saved file, in their stored shapes. Raises StorageError for a damaged one."""
        with sealed.open_tensors(self._found(name)) as file:
            return {key: file.tensor(key) for key in file.tensors}

    def load_tensor(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a saved file, in its stored shape; the others are not read."""
        with sealed.open_tensors(self._found(name)) as file:
            return file.tensor(key)

    def drop(self, name: str) -> None:
        """Forget a result, so that it is made again."""
        guard_storage(self.folder / name, partial(disk.remove, self.folder / name))

    def _found(self, name: str) -> Path:
        """A result's file; one that another machine has just made may take a while to show."""
        path, until = self.folder / name, time.monotonic() + PATIENCE_SECONDS * self._shared
        while not path.is_file() and time.monotonic() < until:
            time.sleep(0.2)
            if path.parent.is_dir():
                list(path.parent.iterdir())  # makes a network file system look again
        return path

    def kept_folder(self, name: str) -> Path:
        """A sub-folder for files that are written piece by piece; what is in it stays."""
        path = self.folder / name
        guard_storage(path, lambda: path.mkdir(exist_ok=True))
        return path

    def new_folder(self, name: str) -> Path:
        """An empty sub-folder, for what is to be written in one go: nothing of it is taken up."""
        path = self.folder / name

        def make() -> None:
            disk.remove(path)
            path.mkdir()

        guard_storage(path, make)
        return path

    def publish(self, finished: str, overwrite: bool = False) -> None:
        """What is `finished`, a sub-folder or a file, gets the output's name; see `put_in_place`."""
        if self._later is not None:
            self._later.close(sync=False)  # what is not published goes
        self.put_in_place(self.folder / finished, overwrite)


def is_written(writer: CheckpointWriter, name: str, digest: TensorDigest, noted: str) -> bool:
    """Whether a tensor lies in its file with the digest that was `noted`; else it is said.

    `digest` is one of no bytes yet, of the tensor's dtype and shape.
    """
    for data in writer.stored(name):
        digest.update(memoryview(data))
    if digest.identity().startswith(noted):
        return True
    warnings.warn(
        f"Tensor {name} in {writer.folder}, of an earlier run, is damaged or not whole; it is made "
        "again.",
        StorageWarning,
        stacklevel=3,
    )
    return False


def checksum(tensor: torch.Tensor) -> str:
    """Checksum of one part, of any shape, as the manifest holds it."""
    digest = TensorDigest(DTYPE_NAMES[tensor.dtype], tensor.shape)
    digest.update(tensor_bytes(tensor))
    return digest.checksum()
