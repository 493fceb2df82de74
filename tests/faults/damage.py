"""Harm done to files: by a bad disk, a bad copy, or a careless hand."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path


def flip(file: Path, rng: random.Random) -> str:
    """One bit."""
    data = bytearray(file.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {at}"


def cut(file: Path, rng: random.Random) -> str:
    """The end is missing."""
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"cut to {size} bytes"


def zeros(file: Path, rng: random.Random) -> str:
    """A stretch that was never written, as after a power failure."""
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((16, 512, 4096)))
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return f"zeros from {start} to {stop}"


def longer(file: Path, rng: random.Random) -> str:
    """Bytes that do not belong to it."""
    with file.open("ab") as out:
        out.write(rng.randbytes(rng.choice((1, 8, 300))))
    return "longer"


def remove(file: Path, rng: random.Random) -> str:
    file.unlink()
    return "removed"


def empty(file: Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return "emptied"


WAYS: dict[str, tuple[int, Callable[[Path, random.Random], str]]] = {
    "flip": (8, flip), "cut": (3, cut), "zeros": (3, zeros), "longer": (1, longer),
    "remove": (2, remove), "empty": (1, empty), "exchange": (2, remove),
}  # fmt: skip


def harm(files: Iterable[Path], rng: random.Random, ways: Iterable[str] = WAYS) -> str:
    """Do one harm to one of the files; says what and where, or nothing if there is nothing to harm."""
    files = sorted(file for file in files if file.is_file() and file.stat().st_size)
    ways = list(ways)
    if not files:
        return ""
    way = rng.choices(ways, [WAYS[each][0] for each in ways])[0]
    file = rng.choice(files)
    if way == "exchange" and len(files) > 1:
        other = rng.choice([each for each in files if each != file])
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
        return f"{file.name} and {other.name} exchanged"
    return f"{file.name}: {WAYS[way][1](file, rng)}"


def files_of(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in folder.rglob("*") if file.is_file()]
