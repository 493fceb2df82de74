"""Files of unfinished work and of caches, each with a seal: a digest of its name and all its bytes.

    file.json          {"value": ..., "of": {"other.safetensors": its seal}, "seal": "..."}
    file.safetensors   {"__metadata__": {"seal": "...", ...}, ...} and the tensors

A file is written under a name of its own, synced, and renamed. The seal is its mark: it cannot be
there without the bytes that it speaks of. So whatever befell a file since it was written (a flipped
bit, a power failure in between, an older one in its place) is seen when it is taken up: its size
and times each time, its seal where it was not this process that wrote it or looked at it before. A
file that does not fit is as good as absent, but for a word.

`of` binds files that belong together: a JSON file fits only with those very files beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltafold.checkpoint import disk
from deltafold.checkpoint.disk import Later
from deltafold.checkpoint.header import build_header
from deltafold.checkpoint.view import Checkpoint
from deltafold.checkpoint.writer import guard_storage, tensor_bytes
from deltafold.dtypes import DTYPE_NAMES
from deltafold.errors import StorageError, StorageWarning
from deltafold.lazy import torch

_NONE = "0" * 32  # where a seal will stand
_BEFORE = b'{"__metadata__":{"seal":"'
_AT = 8 + len(_BEFORE)  # of the seal in a safetensors file
_TAIL = re.compile(rb',"seal":"([0-9a-f]{32})"\}\n\Z')
_CHUNK_BYTES = 1 << 22

Stamp = tuple[int, int, int, int]
_known: dict[str, tuple[Stamp, str]] = {}
"""Files that this process wrote or has looked at: what they were like then, and their seals."""


# --- writing --------------------------------------------------------------------------------------


def save_json(
    path: Path, value: object, of: Sequence[Path] = (), later: Later | None = None
) -> None:
    """Write a JSON value, bound to other sealed files. Raises StorageError."""
    bound = {os.path.relpath(each, path.parent): seal_of(each) for each in of}
    body = '{"value":' + json.dumps(value)
    body += f',"of":{json.dumps(bound)}' if bound else ""
    data = body.encode()
    seal = _digest(path, [data])
    put(path, [data, f',"seal":"{seal}"}}\n'.encode()], later)
    _remember(path, seal)


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    later: Later | None = None,
) -> None:
    """Write tensors of any shape, in this order, as a safetensors file. Raises StorageError."""
    specs = [(name, DTYPE_NAMES[each.dtype], tuple(each.shape)) for name, each in tensors.items()]
    header, _ = build_header(specs, {"seal": _NONE, **(metadata or {})})
    parts = [tensor_bytes(each) for each in tensors.values()]
    seal = _digest(path, [header, *parts])
    put(path, [header[:_AT], seal.encode(), header[_AT + len(seal) :], *parts], later)
    _remember(path, seal)


def put(path: Path, parts: Iterable[bytes | memoryview], later: Later | None = None) -> None:
    """Write a file under a name of its own, sync it, and rename it. Raises StorageError.

    Synced `later`, if that is given: fit for a file with a seal.
    """
    working = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            disk.create(working, parts)
            if later is None:
                disk.sync(working)
            disk.rename(working, path)
        except BaseException:
            working.unlink(missing_ok=True)
            raise
        if later is None:
            disk.sync(path.parent)
        else:
            later.add(path)

    guard_storage(path, write)


# --- taking up ------------------------------------------------------------------------------------


def take_up(path: Path) -> bool:
    """True for a file that is there and fits. One that does not fit is said, and removed."""
    if not path.is_file():
        return False
    wrong = _misfit(path)
    if wrong is not None:
        said = "damaged or not whole" if wrong.exists() else "missing"
        warnings.warn(
            f"{wrong}, of an earlier run, is {said}; it is made again.",
            StorageWarning,
            stacklevel=2,
        )
        guard_storage(path, lambda: path.unlink(missing_ok=True))
    return wrong is None


def fits(path: Path) -> bool:
    """Whether a file is there as it was written, with all that it is bound to."""
    return _misfit(path) is None


def _misfit(path: Path) -> Path | None:
    """The file that is not as it was written: this one, or one that it is bound to."""
    bound: dict[str, str] = {}
    if not _has_seal(path, None):
        return path
    if path.suffix == ".json":
        bound = json.loads(path.read_bytes()).get("of", {})
    wrong = (name for name, seal in bound.items() if not _has_seal(path.parent / name, seal))
    return next((path.parent / name for name in wrong), None)


def _has_seal(path: Path, seal: str | None) -> bool:
    try:
        found = _seal_in(path)
    except OSError:
        return False
    return found is not None and seal in (None, found)


def load_json(path: Path) -> Any:
    """The value of a file. Raises StorageError for one that does not fit any more."""
    _check(path)
    return json.loads(path.read_bytes())["value"]


def open_tensors(path: Path) -> Checkpoint:
    """The tensors of a file. Raises StorageError for one that does not fit any more."""
    _check(path)
    return Checkpoint(path)


def seal_of(path: Path) -> str:
    """The seal of a file. Raises StorageError for one that does not fit."""
    _check(path)
    return _known[str(path)][1]


def forget(folder: Path) -> None:
    """What lies in a folder is looked at anew when it is taken up again."""
    inside = f"{folder}{os.sep}"
    for path in [each for each in _known if each.startswith(inside)]:
        del _known[path]


def _check(path: Path) -> None:
    try:
        found = _seal_in(path)
    except OSError:
        found = None
    if found is None:
        raise StorageError(
            f"{path} is missing or damaged; run the same command again, and it is made anew."
        )


def _seal_in(path: Path) -> str | None:
    """The seal of a file that fits it, else None. Raises OSError."""
    stamp, known = _stamp(path), _known.get(str(path))
    if known is not None and known[0] == stamp:
        return known[1]
    seal = _sealed_tensors(path) if path.suffix == ".safetensors" else _sealed_text(path)
    if seal is not None:
        _known[str(path)] = (stamp, seal)
    return seal


def _sealed_text(path: Path) -> str | None:
    data = path.read_bytes()
    tail = _TAIL.search(data)
    if tail is None or _digest(path, [data[: tail.start()]]) != tail[1].decode():
        return None
    return tail[1].decode()


def _sealed_tensors(path: Path) -> str | None:
    with path.open("rb") as file:
        start, seal = file.read(_AT), file.read(len(_NONE))
        if start[8:] != _BEFORE:
            return None
        digest = hashlib.sha256(path.name.encode() + start + _NONE.encode())
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return seal.decode() if digest.hexdigest()[: len(_NONE)].encode() == seal else None


def _digest(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256(path.name.encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[: len(_NONE)]


def _remember(path: Path, seal: str) -> None:
    _known[str(path)] = (_stamp(path), seal)


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
