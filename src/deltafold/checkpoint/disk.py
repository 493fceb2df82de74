"""The few calls that make files last. All that must survive a power failure goes through here.

    written   in memory of the system: a kill of the program does no harm, a power failure may
    synced    on the disk: the bytes of a file by its own sync, its name by that of its folder
    renamed   one name takes the place of another, whole, in an instant

`sync` and `rename` are what a test has to watch in order to know what a disk may hold after a power
failure (`tests/power.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

SYNC_SECONDS = 0.5
"""How long a file may wait until it is synced together with others."""
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


def create(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file, not yet synced. Raises OSError."""
    with path.open("wb") as out:
        for part in parts:
            out.write(part)


def sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder with all that is in it. Raises OSError."""
    if path.is_dir():
        for each in path.iterdir():
            sync_tree(each)
    sync(path)


def rename(source: Path, target: Path) -> None:
    """`source` gets the name `target`. Not synced: the folders have to be. Raises OSError."""
    source.replace(target)


def exchange(one: Path, other: Path) -> bool:
    """Each gets the other's name in one instant. False where the system cannot do that."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def take_place(made: Path, target: Path, aside: Path) -> None:
    """What was `made` gets the name `target`, and what bore it, if anything, the name `aside`.

    All that was made is on the disk before it has the name, and the name is when this returns. There
    is no instant without a `target` where the system can exchange names. Raises OSError.
    """
    sync_tree(made)
    sync(made.parent)
    if not target.exists():
        rename(made, target)
    elif exchange(made, target):
        rename(made, aside)
    else:
        rename(target, aside)
        rename(made, target)
    sync(target.parent)
    sync(made.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Later:
    """Syncs files of a folder in the background, those of half a second together.

    A sync takes milliseconds, in which whoever waits for it does nothing else. What lies in a file
    that was not synced when the power failed has to be recognised by its reader.
    """

    def __init__(self, root: Path):
        self.root = root
        self._waiting: list[Path] = []
        self._turn = threading.Condition()
        self._busy = self._ended = False
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def add(self, path: Path) -> None:
        """Sync a file before long, and the folders on the way to it."""
        with self._turn:
            self._waiting.append(path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._turn.notify_all()

    def flush(self) -> None:
        """Return when all that was added is on the disk. Raises what failed, also before: OSError."""
        self._sync_waiting()
        with self._turn:
            self._turn.wait_for(lambda: not self._busy)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, sync: bool = True) -> None:
        """Sync what waits, as far as that goes, or forget it, and end."""
        with self._turn:
            self._waiting = self._waiting if sync else []
        with contextlib.suppress(Exception):  # what was not synced is looked at when it is taken up
            self.flush()
        with self._turn:
            self._ended = True
            self._turn.notify_all()

    def _work(self) -> None:
        while not self._ended:
            with self._turn:
                self._turn.wait_for(lambda: self._waiting or self._ended)
                self._turn.wait_for(lambda: self._ended, SYNC_SECONDS)
            self._sync_waiting()

    def _sync_waiting(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: not self._busy)
            taken, self._waiting, self._busy = self._waiting, [], True
        try:
            sync_named(taken, self.root)
        except Exception as error:  # told to whoever asks for what was synced, not by this thread
            self._error = error
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()


def sync_named(paths: Iterable[Path], root: Path) -> None:
    """Sync files, and every folder from them up to `root`. Those that are gone are left out."""
    folders: dict[Path, None] = {}
    for path in dict.fromkeys(paths):
        with contextlib.suppress(FileNotFoundError):
            sync(path)
        for folder in path.parents:
            folders[folder] = None
            if folder == root:
                break
    for folder in sorted(folders, key=lambda each: -len(each.parts)):
        with contextlib.suppress(FileNotFoundError):
            sync(folder)
