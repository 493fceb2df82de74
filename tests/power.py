"""What a disk may hold after a power failure, for tests: runs are recorded, cut, and gone on with.

    sync of a file     its bytes are on the disk            else: any beginning of them, zeros, the old ones
    sync of a folder   the names in it are on the disk      else: each change of names, or not, at will
    rename, exchange   all of it or nothing

While a run goes on, `Recorder` watches `checkpoint/disk.py`, through which all goes that has to last,
and keeps apart what was synced. At moments drawn by a seed it writes down a state that the disk may be
in if the power failed right then.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deltafold.checkpoint import disk

Names = dict[int, dict[str, int]]
"""Of each folder, by its inode: the inode that bears each name."""


@dataclass
class State:
    """Names and contents below one folder, by inode."""

    root: int
    names: Names = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> State:
        """As the system shows it now."""
        found = cls(folder.stat().st_ino)
        found._read(folder)
        return found

    def _read(self, folder: Path) -> None:
        names = self.names.setdefault(folder.stat().st_ino, {})
        for each in folder.iterdir():
            with suppress(FileNotFoundError):  # another thread has removed it
                inode = each.stat().st_ino
                if each.is_dir():
                    self._read(each)
                else:
                    self.contents[inode] = each.read_bytes()
                names[each.name] = inode

    def places(self) -> dict[int, set[tuple[int, str]]]:
        """Where each inode is: (folder, name)."""
        found: dict[int, set[tuple[int, str]]] = {}
        for folder, names in self.names.items():
            for name, inode in names.items():
                found.setdefault(inode, set()).add((folder, name))
        return found

    def write(self, target: Path) -> None:
        """Write the state down as an ordinary folder."""
        self._write(self.root, target)

    def _write(self, inode: int, target: Path) -> None:
        target.mkdir(parents=True)
        for name, each in self.names.get(inode, {}).items():
            if each in self.contents:
                (target / name).write_bytes(self.contents[each])
            else:
                self._write(each, target / name)


class Recorder:
    """Watches what is synced below `root`, and cuts the power at given moments."""

    def __init__(self, root: Path, seed: int, moments: frozenset[int] = frozenset()):
        self.root, self.moments, self.random = root, moments, random.Random(seed)
        self.turn = threading.RLock()  # tasks run in several threads
        self.count = 0
        self.cut: list[State] = []
        self._open: dict[int, int] = {}  # an inode that is held is not given to another file
        self.synced = State.of(root)
        for each in [root, *root.rglob("*")]:
            self._hold(each)

    def _hold(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self._open:
            self._open[inode] = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def moment(self) -> None:
        """Before each call that makes something last; the caller holds `turn`."""
        if self.count in self.moments:
            self.cut.append(self._after_failure(State.of(self.root)))
        self.count += 1

    def sync(self, path: Path) -> None:
        """In place of `disk.sync`."""
        with self.turn:
            self._sync(path)

    def _sync(self, path: Path) -> None:
        self.moment()
        if not path.exists():
            raise FileNotFoundError(2, "gone", str(path))
        if path != self.root and self.root not in path.parents:
            return
        self._hold(path)
        inode = path.stat().st_ino
        if not path.is_dir():
            self.synced.contents[inode] = path.read_bytes()
            return
        self.synced.names[inode] = {}
        for each in path.iterdir():
            with suppress(FileNotFoundError):
                self._hold(each)
                self.synced.names[inode][each.name] = each.stat().st_ino
                if not each.is_dir():
                    self.synced.contents.setdefault(each.stat().st_ino, b"")

    def _after_failure(self, now: State) -> State:
        """Something between what was synced and what is there now."""
        before, after = self.synced.places(), now.places()
        names: Names = {}
        for group in self._changes(before, after):
            chosen = after if self.random.random() < 0.5 else before
            for inode in group:
                for folder, name in chosen.get(inode, ()):
                    names.setdefault(folder, {})[name] = inode
        contents = {
            inode: self._bytes(self.synced.contents.get(inode, b""), now.contents.get(inode))
            for inode in {*now.contents, *self.synced.contents}
        }
        return State(now.root, names, contents)

    def _changes(
        self, before: dict[int, set[tuple[int, str]]], after: dict[int, set[tuple[int, str]]]
    ) -> list[list[int]]:
        """Inodes whose names change together: one takes the other's place."""
        group = {inode: inode for inode in {*before, *after}}

        def find(inode: int) -> int:
            while group[inode] != inode:
                inode = group[inode]
            return inode

        owners: dict[tuple[int, str], int] = {}
        for inode, places in [*before.items(), *after.items()]:
            for place in places:
                group[find(inode)] = find(owners.setdefault(place, inode))
        found: dict[int, list[int]] = {}
        for inode in sorted(group):
            found.setdefault(find(inode), []).append(inode)
        return list(found.values())

    def _bytes(self, old: bytes, new: bytes | None) -> bytes:
        if new is None or new == old:
            return old
        at = self.random.randrange(len(new) + 1)
        return self.random.choice([new, old, new[:at], new[:at] + bytes(len(new) - at)])


@contextmanager
def recorded(root: Path, seed: int, moments: frozenset[int] = frozenset()) -> Iterator[Recorder]:
    """Record what runs inside; what may wait for its sync gets one at once, or never."""
    recorder = Recorder(root, seed, moments)
    rename, exchange = disk.rename, disk.exchange

    def renamed(source: Path, target: Path) -> None:
        with recorder.turn:
            recorder.moment()
            rename(source, target)

    def exchanged(one: Path, other: Path) -> bool:
        with recorder.turn:
            recorder.moment()
            return exchange(one, other)

    def add(self: disk.Later, path: Path) -> None:
        with recorder.turn:
            now = recorder.random.random() < 0.5
        if now:
            disk.sync_named([path], self.root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "sync", recorder.sync)
        patch.setattr(disk, "rename", renamed)
        patch.setattr(disk, "exchange", exchanged)
        patch.setattr(disk.Later, "add", add)
        try:
            yield recorder
        finally:
            recorder.close()


def failures(
    root: Path, run: Callable[[], object], seed: int, number: int, target: Path
) -> list[Path]:
    """Run once to count, then again from the same start, with `number` failures: a folder of each.

    `run` writes below `root`, as it is now; and so it is left.
    """
    start = State.of(root)
    with recorded(root, seed) as counted:
        run()
    reset(root, start)
    moments = frozenset(drawn_moments(random.Random(seed), counted.count, number))
    with recorded(root, seed, moments) as found:
        run()
    reset(root, start)
    folders = [target / f"{place:03d}" for place in range(len(found.cut))]
    for folder, state in zip(folders, found.cut, strict=True):
        state.write(folder)
    return folders


def drawn_moments(drawn: random.Random, count: int, number: int) -> list[int]:
    """Half of them anywhere, half near the end, where the output gets its name."""
    last = range(max(0, count - 8), count)
    near = drawn.sample(last, min(number // 2, len(last)))
    others = [moment for moment in range(count) if moment not in near]
    return near + drawn.sample(others, min(number - len(near), len(others)))


def reset(root: Path, state: State) -> None:
    """Make a folder what it was."""
    disk.remove(root)
    state.write(root)
