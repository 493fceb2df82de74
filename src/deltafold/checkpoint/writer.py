"""A streaming writer of sharded safetensors.

All headers are known before the first byte of weights, so each shard is laid out at once (a sparse
file of its final length) and tensors are written at their offsets in any order, from any thread.
The caller keeps the folder under a working name and renames it when everything is in place.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deltafold.checkpoint.contents import STEMS, folder_of, stem_of
from deltafold.checkpoint.header import build_header
from deltafold.dtypes import stored_bytes
from deltafold.errors import not_shared
from deltafold.foreign import unwritten
from deltafold.lazy import torch

Result = TypeVar("Result")
TensorSpec = tuple[str, str, tuple[int, ...]]
"""(name, dtype as in the header, shape)"""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any shape, without a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def guard_storage(path: Path, action: Callable[[], Result]) -> Result:
    """Run `action`; a full, read-only or unreachable disk becomes one clear sentence."""
    try:
        return action()
    except OSError as error:
        raise unwritten(error, path) from error


def put_file(folder: Path, name: str, data: bytes) -> None:
    """Write a small file under its relative name. Raises StorageError."""
    path = folder / name

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    guard_storage(path, write)


def plan_shards(
    tensors: list[TensorSpec],
    shard_bytes: int,
    inner: Mapping[str, str] | None = None,
    stem: str = STEMS[0],
) -> dict[str, list[TensorSpec]]:
    """Split tensors, in order, into shards of at most `shard_bytes` (a larger tensor stands alone).

    Those that are in `inner` stay in the file, of a folder inside, that it names. Names of the others
    begin with `stem`.
    """
    inner = inner or {}
    kept: dict[str, list[TensorSpec]] = {}
    for spec in tensors:
        if spec[0] in inner:
            kept.setdefault(inner[spec[0]], []).append(spec)
    own = [spec for spec in tensors if spec[0] not in inner]
    return (_plan_own(own, shard_bytes, stem) if own or not kept else {}) | kept


def _plan_own(
    tensors: list[TensorSpec], shard_bytes: int, stem: str
) -> dict[str, list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        size = stored_bytes(spec[1], spec[2])
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    total = len(groups)
    return {f"{stem}-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


class CheckpointWriter:
    """Writes tensors into preallocated shards under `folder`.

    `layout` maps shard file names to the tensors they hold, in order; names of tensors in a folder
    inside begin with that folder, see `Checkpoint`. Opening an existing folder of the same layout
    keeps what is in it (for resuming); the headers are rewritten.

    Pickled, it writes into the same files from other processes. There every write is on disk, and
    only its own bytes are, before it returns: a network file system may otherwise write whole
    pages, and put back what others have written beside.
    """

    def __init__(
        self,
        folder: Path,
        layout: dict[str, list[TensorSpec]],
        metadata: dict[str, str] | None = None,
    ):
        self.folder = folder
        self.layout = layout
        self._starts: dict[str, tuple[int, int]] = {}
        self._sizes: dict[str, int] = {}
        self._descriptors: list[int] = []
        self._lock = threading.Lock()
        for file, tensors in layout.items():
            guard_storage(folder / file, partial(self._open, file, tensors, metadata))

    def _open(self, file: str, tensors: list[TensorSpec], metadata: dict[str, str] | None) -> None:
        place = folder_of(file)
        bare = [(name.removeprefix(place), dtype, shape) for name, dtype, shape in tensors]
        header, starts = build_header(bare, metadata)
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors.append(descriptor)
        end = len(header)
        for name, dtype, shape in bare:
            self._starts[place + name] = (descriptor, starts[name])
            self._sizes[place + name] = stored_bytes(dtype, shape)
            end = max(end, starts[name] + stored_bytes(dtype, shape))
        os.ftruncate(descriptor, end)
        _write_all(descriptor, memoryview(header), 0)

    def __getstate__(self) -> dict[str, Any]:
        for descriptor in self._descriptors:  # the headers
            guard_storage(self.folder, partial(os.fsync, descriptor))
        files = dict(zip(self._descriptors, self.layout, strict=True))
        starts = {name: (files[each], start) for name, (each, start) in self._starts.items()}
        return {"folder": self.folder.absolute(), "layout": self.layout, "starts": starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.layout = state["folder"], state["layout"]
        self._lock = threading.Lock()
        self._descriptors = []
        weakref.finalize(self, _close_all, self._descriptors)
        files = {}
        for file in self.layout:
            try:
                files[file] = os.open(self.folder / file, os.O_RDWR | os.O_DSYNC)
            except OSError:
                raise not_shared(self.folder / file) from None
            self._descriptors.append(files[file])
        self._starts = {
            name: (files[file], start) for name, (file, start) in state["starts"].items()
        }

    def write(self, name: str, rows: torch.Tensor, offset_elements: int = 0) -> None:
        """Write `rows` (any shape, stored dtype) at an element offset inside tensor `name`."""
        descriptor, start = self._starts[name]
        position = start + offset_elements * rows.element_size()
        data = tensor_bytes(rows)
        guard_storage(self.folder, lambda: _write_all(descriptor, data, position))

    def stored(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor as they lie in its file now, in order."""
        (descriptor, at), left = self._starts[name], self._sizes[name]
        while left:
            data = os.pread(descriptor, min(left, 1 << 22), at)
            if not data:
                return
            yield data
            at, left = at + len(data), left - len(data)

    def finish(self, indexed: bool = True) -> None:
        """Flush everything to disk and, with `indexed`, write the index of a sharded checkpoint."""
        for descriptor in self._descriptors:
            guard_storage(self.folder, partial(os.fsync, descriptor))
        self.close()
        own = {file: specs for file, specs in self.layout.items() if "/" not in file}
        single = f"{stem_of(own)}.safetensors"
        if indexed and list(own) not in ([], [single]):
            weight_map = {spec[0]: file for file, specs in own.items() for spec in specs}
            total = sum(
                stored_bytes(dtype, shape) for specs in own.values() for _, dtype, shape in specs
            )
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            text = json.dumps(index, indent=2) + "\n"
            path = self.folder / f"{single}.index.json"
            guard_storage(path, lambda: path.write_text(text))

    def close(self) -> None:
        with self._lock:
            _close_all(self._descriptors)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    descriptors.clear()


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data[: 1 << 26], offset)
        data, offset = data[count:], offset + count
