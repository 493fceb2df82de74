"""Unfinished work on disk: a folder `NAME.partial` beside the output, with a journal.

The journal names the inputs and settings that the work belongs to. The same command goes on where
it stopped; another one is refused. Results are sealed files (`checkpoint/sealed.py`): one that was
damaged since is made again. When all is in place the output gets its final name by one rename, and
the rest is removed.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from deltafold.archive import TensorDigest
from deltafold.checkpoint import DTYPE_NAMES, CheckpointWriter, disk, sealed, tensor_bytes
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import (
    ClusterError,
    DeltafoldError,
    ResumeError,
    StorageError,
    StorageWarning,
    UsageError,
    not_shared,
)
from deltafold.lazy import torch
from deltafold.running import devices
from deltafold.running.locks import LOCK, Lock

JOURNAL = "journal.json"
REPLACED = "replaced"
PATIENCE_SECONDS = 60.0  # a network file system may say so long that a file is not there


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


class Workspace:
    """The working folder of one output. Use as a context manager: it holds a lock.

    On success call `publish`. Otherwise finished results stay for resuming, unless the error is one
    that the same command can never get past (a wrong base, an impossible budget).

    Pickled, it goes to other processes, on this or other machines: they read and write results, but
    hold no lock and decide nothing.
    """

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool = False):
        self.output = output
        self.folder = partial_path(output)
        self.identity = json.loads(json.dumps(identity | devices.identity()))
        self.resumed = False
        self.restart = restart
        self._lock: Lock | None = None
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

    def __enter__(self) -> Workspace:
        begun = self._check_ours()
        self._lock = Lock(
            self.folder,
            f"Another deltafold is writing {self.output} right now; wait for it or choose another "
            "output.",
        )
        try:
            self._open_journal(begun)
        except BaseException:
            self._release()
            raise
        self._later = disk.Later(self.folder)
        return self

    def _check_ours(self) -> bool:
        """Whether an earlier run has left a lock. Raises UsageError for someone else's folder.

        That is one which holds something but no journal: the journal comes first and goes last.
        """
        try:
            names = {item.name for item in self.folder.iterdir()}
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(
                f"{self.folder} is needed for unfinished work and is no folder that can be read "
                f"({error.strerror}); move it away or choose another output."
            ) from error
        found = {name for name in names - {LOCK} if not name.startswith(f"{JOURNAL}.")}
        if found and JOURNAL not in found:
            raise UsageError(
                f"{self.folder} is needed for unfinished work but holds other files "
                f"({min(found)}); move it away or choose another output."
            )
        return LOCK in names

    def _open_journal(self, begun: bool) -> None:
        """Go on with what the journal is of, or begin. Raises ResumeError."""
        path = self.folder / JOURNAL
        if path.exists() and not self.restart:
            if self._goes_on(path, begun):
                self.resumed = True
                return
            warnings.warn(
                f"{path} is damaged or of another version, so nobody knows what the work beside it "
                "was; it is begun anew.",
                StorageWarning,
                stacklevel=3,
            )
        guard_storage(self.folder, self._clear)
        sealed.save_json(path, self.identity)
        guard_storage(self.folder, partial(disk.sync_named, [self.folder], self.output.parent))

    def _goes_on(self, path: Path, begun: bool) -> bool:
        """Whether the journal is of this very work; False where it cannot be read."""
        if not sealed.fits(path):
            if begun:
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
        for item in sorted(self.folder.iterdir(), key=lambda each: each.name == JOURNAL):
            if item.name != LOCK:
                disk.remove(item)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._later is not None:
            self._later.close()
        sealed.forget(self.folder)
        hopeless = kind is not None and issubclass(kind, DeltafoldError)
        if hopeless and not issubclass(kind, StorageError | ClusterError):  # type: ignore[arg-type]
            self._remove()
        self._release()

    def _remove(self) -> None:
        """Remove the folder, as far as that goes."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):
                lock.remove(last=JOURNAL)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

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
        """Write tensors (sorted by name) as one safetensors file, by rename."""
        ordered = dict(sorted(tensors.items()))
        sealed.save_tensors(self.folder / name, ordered, later=self._later)

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Raises StorageError if they are missing or damaged."""
        with sealed.open_tensors(self._found(name)) as file:
            return {key: file.tensor(key) for key in file.tensors}

    def load_tensor(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a saved file; the others are not read."""
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
        """What is `finished` gets the output's name, all of it on the disk; the rest is removed.

        Raises StorageError, and UsageError for an output that has come into being meanwhile. That
        the rest cannot be removed is a warning: the output is there.
        """
        made, replaced = self.folder / finished, self.folder / REPLACED
        if self._later is not None:
            self._later.close(sync=False)  # what is left of it goes
        if self.output.exists() and not overwrite:
            raise UsageError(
                f"{self.output} was made while this run was under way; choose another output or add "
                "--overwrite."
            )

        def move() -> None:
            disk.remove(replaced)
            disk.take_place(made, self.output, replaced)

        guard_storage(self.output, move)
        lock, self._lock = self._lock, None
        assert lock is not None
        try:
            lock.remove(last=JOURNAL)
        except OSError as error:
            warnings.warn(
                f"{self.output} is whole and in its place, but {self.folder} cannot be removed "
                f"({error.strerror}); remove it.",
                StorageWarning,
                stacklevel=2,
            )


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
    """Checksum of one part as the manifest holds it."""
    digest = TensorDigest(DTYPE_NAMES[tensor.dtype], tensor.shape)
    digest.update(tensor_bytes(tensor))
    return digest.checksum()
