"""Folders that one process holds at a time; the lock goes with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from deltafold.checkpoint import disk
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import StorageError, UsageError

LOCK = "lock"
OURS = b"deltafold\n"
"""What a lock holds, so that a folder is known to be ours."""
_TRIES = 1000  # a folder may be removed, by who held it, while its lock is taken


def is_ours(folder: Path) -> bool:
    """Whether a process of ours has held a folder."""
    try:
        return (folder / LOCK).read_bytes() == OURS
    except OSError:
        return False


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Hold a folder when it is free, and remove it at the end: for what a cache is made with."""
    lock = Lock(folder, f"{folder} is removed again and again; try once more.", waits=True)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            lock.remove()


def sweep(root: Path) -> None:
    """Remove the folders in `root` that processes held which are gone."""
    for folder in root.iterdir() if root.is_dir() else ():
        if (folder / LOCK).is_file():
            with contextlib.suppress(UsageError, StorageError, OSError):
                Lock(folder, "").remove()


class Lock:
    """Holds `folder`, which is made if it is not there, until it is released.

    Raises UsageError with the words `taken` if another process holds it, or `waits`; StorageError.
    """

    def __init__(self, folder: Path, taken: str, *, waits: bool = False):
        self.folder, self._how = folder, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB)
        for _ in range(_TRIES):
            self._descriptor = guard_storage(folder / LOCK, self._open)
            if self._take():
                self._mark()
                return
            os.close(self._descriptor)
            if not self._gone:
                break
        raise UsageError(taken)

    def _take(self) -> bool:
        self._gone = False
        try:
            fcntl.flock(self._descriptor, self._how)
            self._gone = not os.path.samestat(
                os.fstat(self._descriptor), (self.folder / LOCK).stat()
            )
        except FileNotFoundError:
            self._gone = True
        except OSError:
            return False
        return not self._gone

    def _mark(self) -> None:
        try:
            guard_storage(self.folder / LOCK, lambda: os.pwrite(self._descriptor, OURS, 0))
        except BaseException:
            self.release()
            raise

    def _open(self) -> int:
        failed = OSError()
        for _ in range(_TRIES):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                return os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except (FileNotFoundError, FileExistsError) as error:  # it is being removed, or a file
                failed = error
        raise failed

    def release(self) -> None:
        """Let others have the folder."""
        os.close(self._descriptor)

    def remove(self, last: str | None = None) -> None:
        """Remove the folder, the file `last` after the others, and release it. Raises OSError.

        The folder stays if another process has made a lock in it meanwhile: it is theirs.
        """
        try:
            for each in self.folder.iterdir():
                if each.name not in (LOCK, last):
                    disk.remove(each)
            if last is not None:
                disk.sync(self.folder)
                disk.remove(self.folder / last)
            disk.remove(self.folder / LOCK)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        finally:
            self.release()
