"""The n-th call of the file system: counted, refused, cut short, or the last thing a process does."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

WRITING = (
    "open for writing",
    "write",
    "pwrite",
    "ftruncate",
    "fsync",
    "mkdir",
    "replace",
    "unlink",
)
READING = ("open for reading", "preadv", "stat")
CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."

Effect = Callable[[], None]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise(make: Callable[[], BaseException]) -> Effect:
    def effect() -> None:
        raise make()

    return effect


EFFECTS: dict[str, Effect] = {
    "kill": _kill,
    "stop": _stop,
    "interrupt": _raise(KeyboardInterrupt),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "no space": _raise(lambda: OSError(errno.ENOSPC, "No space left on device")),
    "quota": _raise(lambda: OSError(errno.EDQUOT, "Disk quota exceeded")),
    "input/output error": _raise(lambda: OSError(errno.EIO, "Input/output error")),
    "open files": _raise(lambda: OSError(errno.EMFILE, "Too many open files")),
    "no right": _raise(lambda: PermissionError(errno.EACCES, "Permission denied")),
    "read-only": _raise(lambda: OSError(errno.EROFS, "Read-only file system")),
    "memory": _raise(MemoryError),
    "memory of torch": _raise(lambda: RuntimeError(CPU_MEMORY)),
    "memory of a GPU": _raise(lambda: torch.OutOfMemoryError("CUDA out of memory. GPU 0 has")),
}


class Calls:
    """Counts calls that touch `folder`; at number `at` (from 0) of the `kinds` something happens.

    With `again` all later ones of these kinds fail as well, as on a disk that stays full.
    """

    def __init__(
        self,
        folder: Path,
        kinds: tuple[str, ...],
        at: int = -1,
        effect: str = "kill",
        again: bool = False,
    ):
        self.folder, self.kinds, self.at, self.again = str(folder), kinds, at, again
        self.effect = EFFECTS[effect]
        self.ends = effect not in ("stop", "terminate")  # the call is not carried out after it
        self.count = 0
        self.names: list[str] = []
        self._lock = threading.RLock()
        self._ours: set[int] = set()

    def met(self, kind: str, path: object, half: Effect | None = None) -> None:
        """One call; `half` does half of a write before the effect."""
        if kind not in self.kinds:
            return
        if isinstance(path, int):
            if path not in self._ours:
                return
        elif not self._is_inside(path):
            return
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number == self.at or (self.again and 0 <= self.at < number):
            if half is not None and self.ends:
                half()
            self.effect()

    def _is_inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)  # noqa: PTH100 (calls nothing)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Calls]:
        """Calls of this process are met inside."""
        real_open, real_io, real_pwrite = os.open, io.open, os.pwrite

        def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
            writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self.met("open for writing" if writing else "open for reading", path)
            found = real_open(path, flags, *more, **named)
            if self._is_inside(path):
                self._ours.add(found)
            return found

        def io_opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            writing = any(letter in mode for letter in "wax+")
            if isinstance(file, int):
                return real_io(file, mode, *more, **named)
            self.met("open for writing" if writing else "open for reading", file)
            found = real_io(file, mode, *more, **named)
            return _Watched(found, file, self) if writing else found

        def pwritten(descriptor: int, data: Any, offset: int) -> int:
            def half() -> None:
                real_pwrite(descriptor, data[: len(data) // 2], offset)

            self.met("pwrite", descriptor, half)
            return real_pwrite(descriptor, data, offset)

        with contextlib.ExitStack() as stack:
            for owner, name, found in (
                (os, "open", opened), (io, "open", io_opened), (os, "pwrite", pwritten),
                *((os, name, self._met_first(name, getattr(os, name)))
                  for name in ("preadv", "ftruncate", "fsync", "mkdir", "replace", "unlink", "stat")),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(owner, name, found))
            yield self

    def _met_first(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *more: Any, **named: Any) -> Any:
            self.met(name, path)
            return real(path, *more, **named)

        return called


class _Watched:
    """A file open for writing."""

    def __init__(self, file: Any, path: object, calls: Calls):
        self._file, self._path, self._calls = file, path, calls

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._calls.met("write", self._path, half)
        return self._file.write(data)

    def __enter__(self) -> _Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
