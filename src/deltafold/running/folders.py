"""A folder beside an output in which it is made: held by one process, gone when the output is there."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

from deltafold.checkpoint import disk
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import (
    DeltafoldError,
    StorageError,
    StorageWarning,
    UsageError,
)
from deltafold.running.locks import LOCK, Lock, is_ours

REPLACED = "replaced"


class WorkFolder:
    """`NAME.WORD` beside an output. Use as a context manager: it holds a lock.

    Left by an error that the same command can never get past (a wrong base, an impossible budget), or
    with nothing in it, it is removed; else what is in it stays for the next try. Raises UsageError if
    another process holds it or it is someone else's, StorageError.
    """

    first: str | None = None
    """The file that is written into it before all others, and goes after them."""

    def __init__(self, output: Path, word: str):
        self.output = output
        self.folder = output.with_name(f"{output.name}.{word}")
        self.begun = False  # an earlier run has held it
        self.keeps = False  # whatever the error, what is in it is of use for another try
        self._lock: Lock | None = None

    def __enter__(self) -> Self:
        self.begun = self._check_ours()
        self._lock = Lock(
            self.folder,
            f"Another deltafold is writing {self.output} right now; wait for it or choose another "
            "output.",
        )
        try:
            self.opened()
        except BaseException:
            self._release()
            raise
        return self

    def opened(self) -> None:
        """Called when the folder is held."""

    def _check_ours(self) -> bool:
        """Whether an earlier run has held it. Raises UsageError for someone else's folder.

        That is one which holds something, but neither our lock nor what a run puts there first.
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
        if is_ours(self.folder):
            return True
        found = {name for name in names - {LOCK} if not name.startswith(f"{self.first}.")}
        if found and self.first not in names:
            raise UsageError(
                f"{self.folder} is needed for unfinished work but holds other files "
                f"({min(found)}); move it away or choose another output."
            )
        return False

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if isinstance(error, DeltafoldError) and not self.keeps:
            with contextlib.suppress(OSError):
                if not error.passing or self._is_bare():
                    self._remove()
        self._release()

    def _is_bare(self) -> bool:
        """Whether no result is in it yet."""
        return {item.name for item in self.folder.iterdir()} <= {LOCK, self.first}

    def put_in_place(self, made: Path, overwrite: bool) -> None:
        """What was `made` in here gets the output's name, all of it on the disk; the rest goes.

        Raises StorageError, and UsageError for an output that has come into being meanwhile.
        """
        if self.output.exists() and not overwrite:
            raise UsageError(
                f"{self.output} was made while this run was under way; choose another output or add "
                "--overwrite."
            )
        replaced = self.folder / REPLACED

        def move() -> None:
            disk.remove(replaced)
            disk.take_place(made, self.output, replaced)

        guard_storage(self.output, move)
        self.finished()

    def finished(self) -> None:
        """The output is in its place, and the folder goes. That it cannot is a warning."""
        try:
            self._remove()
        except OSError as error:
            warnings.warn(
                f"{self.output} is whole and in its place, but {self.folder} cannot be removed "
                f"({error.strerror}); remove it.",
                StorageWarning,
                stacklevel=3,
            )

    def _remove(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.remove(last=self.first)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
