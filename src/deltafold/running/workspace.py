"""Unfinished work on disk: a folder `NAME.partial` beside the output, with a journal.

The journal names the inputs and settings that the work belongs to. The same command goes on where
it stopped; another one is refused. Results land by rename, so that what is there is whole. When all
is in place the output gets its final name by one rename, and the rest is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltafold.archive import MANIFEST_FILE, TensorDigest
from deltafold.checkpoint import DTYPE_NAMES, Checkpoint, tensor_bytes
from deltafold.checkpoint.header import build_header
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import (
    ClusterError,
    DeltafoldError,
    ResumeError,
    StorageError,
    UsageError,
    not_shared,
)
from deltafold.lazy import torch
from deltafold.running import devices

JOURNAL = "journal.json"
LOCK = "lock"
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
        self._lock: int | None = None
        self._shared = False  # others read and write here, too
        self._joined = False  # this is one of the others

    def __reduce__(self) -> tuple[Callable[..., Workspace], tuple[Any, ...]]:
        self._shared = True
        return Workspace._join, (self.output.absolute(), self.identity)

    @classmethod
    def _join(cls, output: Path, identity: dict[str, Any]) -> Workspace:
        """The workspace that another process has opened. Raises ClusterError if it is not there."""
        found = cls(output, identity)
        found._shared = found._joined = True
        try:
            same = json.loads((found.folder / JOURNAL).read_text()) == identity
        except (OSError, ValueError):
            same = False
        if not same:
            raise not_shared(found.folder)
        return found

    def __enter__(self) -> Workspace:
        guard_storage(self.folder, lambda: self.folder.mkdir(parents=True, exist_ok=True))
        try:
            self._take_lock()
            self._check_ours()
            if self.restart:
                self._clear()
            self._open_journal()
        except BaseException:
            self._release()
            raise
        return self

    def _take_lock(self) -> None:
        """Hold the folder for this process; the lock goes with the process, however it ends."""
        path = self.folder / LOCK
        self._lock = guard_storage(path, lambda: os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it before may have published, and removed the folder, in between.
            held = os.path.samestat(os.fstat(self._lock), path.stat())
        except OSError:
            held = False
        if not held:
            raise UsageError(
                f"Another deltafold is writing {self.output} right now; wait for it or choose "
                "another output."
            )

    def _check_ours(self) -> None:
        """A folder of this name that holds something but no journal is someone else's."""
        found = {item.name for item in self.folder.iterdir()} - {LOCK, f"{JOURNAL}.tmp"}
        if found and JOURNAL not in found:
            raise UsageError(
                f"{self.folder} is needed for unfinished work but holds other files "
                f"({min(found)}); move it away or choose another output."
            )

    def _clear(self) -> None:
        for item in self.folder.iterdir():
            if item.is_dir():
                shutil.rmtree(item)
            elif item.name != LOCK:
                item.unlink()

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hopeless = kind is not None and issubclass(kind, DeltafoldError)
        if hopeless and not issubclass(kind, StorageError | ClusterError):  # type: ignore[arg-type]
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def save_json(self, name: str, value: object) -> None:
        self._write_text(self.folder / name, json.dumps(value))

    def load_json(self, name: str) -> Any:
        return json.loads(self._found(name).read_text())

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors of any shape (sorted by name) as one safetensors file, by rename."""
        specs = [(k, DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in sorted(tensors.items())]
        header, _ = build_header(specs, None)
        path = self.folder / name
        self._write(path, [header, *(tensor_bytes(tensors[key]) for key, _, _ in specs)])

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a saved file, in their stored shapes."""
        with Checkpoint(self._found(name)) as file:
            return {key: file.tensor(key) for key in file.tensors}

    def load_tensor(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a saved file, in its stored shape; the others are not read."""
        with Checkpoint(self._found(name)) as file:
            return file.tensor(key)

    def _found(self, name: str) -> Path:
        """A result's file; one that another machine has just made may take a while to show."""
        path, until = self.folder / name, time.monotonic() + PATIENCE_SECONDS * self._shared
        while not path.is_file() and time.monotonic() < until:
            time.sleep(0.2)
            if path.parent.is_dir():
                list(path.parent.iterdir())  # makes a network file system look again
        return path

    def _write_text(self, path: Path, text: str) -> None:
        self._write(path, [text.encode()])

    def _write(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        """Write by rename. What others are told of must be on disk, and no two write one file."""
        suffix = f".{secrets.token_hex(4)}.tmp" if self._joined else ".tmp"
        working = path.with_name(path.name + suffix)

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with working.open("wb") as out:
                for part in parts:
                    out.write(part)
                if self._joined:
                    out.flush()
                    os.fsync(out.fileno())
            working.replace(path)

        guard_storage(path, write)

    def publish(self, finished: str, overwrite: bool = False) -> None:
        """Rename the sub-folder `finished` to the output and remove the rest."""
        replaced = self.folder / "replaced"
        if overwrite and self.output.exists():
            guard_storage(self.output, lambda: self.output.replace(replaced))
        guard_storage(self.output, lambda: (self.folder / finished).replace(self.output))
        shutil.rmtree(self.folder)


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


def checksum(tensor: torch.Tensor) -> str:
    """Checksum of one part, of any shape, as the manifest holds it."""
    digest = TensorDigest(DTYPE_NAMES[tensor.dtype], tensor.shape)
    digest.update(tensor_bytes(tensor))
    return digest.checksum()
