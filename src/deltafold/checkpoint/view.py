"""A checkpoint as the outside world has it: headers now, rows of tensors when asked.

Opening reads a few kilobytes a shard. Rows are read with `pread`, so any number of threads may read
at once, and memory holds only what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from deltafold.checkpoint.contents import (
    INDEX_FILE,
    Contents,
    folder_of,
    is_plain_path,
    read_contents,
    stem_of,
)
from deltafold.checkpoint.header import TensorInfo, read_header
from deltafold.checkpoint.json_files import read_config
from deltafold.checkpoint.kinds import refuse_archive
from deltafold.dtypes import DTYPES, held_shape
from deltafold.errors import CheckpointError, not_shared
from deltafold.foreign import reading
from deltafold.lazy import torch

# What downloads ask for, and what a push replaces. A pattern without a slash is for any folder.
SIDE_FILE_PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template*",
    "preprocessor_config.json", "processor_config.json", "*.py",
)  # fmt: skip

# What a fingerprint reads of each tensor.
WHOLE_BYTES, SAMPLES, SAMPLE_BYTES = 1 << 16, 8, 1 << 12


class Checkpoint:
    """A local Hugging Face folder (or one safetensors file) of weights.

    >>> checkpoint = Checkpoint(Path("llama/"))                                 # doctest: +SKIP
    >>> checkpoint.tensors["model.norm.weight"].shape                           # doctest: +SKIP
    (4096,)
    """

    def __init__(self, path: Path, label: str | None = None):
        self.path = path
        self.label = label or str(path)
        self._contents = contents = _contents(path, self.label)
        self.shards = [path / name if path.is_dir() else path for name in contents.weights]
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for shard, file in zip(self.shards, contents.weights, strict=True):
            self._read(shard, file)
        for index in contents.indices:
            _check_index(path, index, self.tensors)
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _read(self, shard: Path, file: str) -> None:
        """The tensors of one weight file; in a folder inside, their names begin with its name."""
        _refuse_other_file(shard)
        tensors, metadata = read_header(shard)
        self.metadata |= metadata
        for bare, info in tensors.items():
            name = folder_of(file) + bare
            if name in self.tensors:
                first = self.relative(self.tensors[name].file)
                raise CheckpointError(
                    f"{self.label} holds tensor {name} twice, in {first} and in {file}; "
                    "remove the file that does not belong to it."
                )
            self.tensors[name] = replace(info, name=name)

    def relative(self, file: Path) -> str:
        """The name of one of its files inside the folder, with slashes."""
        if file == self.path:
            return file.name
        return Path(os.path.relpath(file, self.path)).as_posix()

    @property
    def inner_files(self) -> dict[str, str]:
        """Tensors of weight files in folders inside, each with its file: a model's other modules."""
        inner = {each: file for each in self.shards if "/" in (file := self.relative(each))}
        return {n: inner[info.file] for n, info in self.tensors.items() if info.file in inner}

    @property
    def stem(self) -> str:
        """What the folder's own weight files are called: `model`, or as diffusers calls them."""
        return stem_of(self.relative(each) for each in self.shards)

    @property
    def own_tensors(self) -> dict[str, TensorInfo]:
        """Tensors of the folder's own weight files, which are those that its config speaks of."""
        inner = self.inner_files
        return {name: info for name, info in self.tensors.items() if name not in inner}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Checkpoint], tuple[Path, str, str]]:
        return _opened_elsewhere, (self.path.absolute(), self.label, self.fingerprint())

    def close(self) -> None:
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                with reading(file, CheckpointError):
                    self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (stop - start, columns) of a tensor seen as a matrix (see `TensorInfo.matrix_shape`).

        Raises ValueError if the tensor has no such rows.
        """
        info = self.tensors[name]
        n_rows, columns = info.matrix_shape
        if not 0 <= start <= stop <= n_rows:
            raise ValueError(f"tensor {name} has {n_rows} rows, not {start} to {stop}")
        row_bytes = columns * info.itemsize
        data = self._data(info, start * row_bytes, stop * row_bytes)
        return as_tensor(data, info.dtype, (stop - start, columns))

    def data(self, name: str) -> bytearray:
        """The bytes of one whole tensor, as they are stored."""
        info = self.tensors[name]
        return self._data(info, 0, info.n_bytes)

    def _data(self, info: TensorInfo, start: int, stop: int) -> bytearray:
        buffer = bytearray(stop - start)
        view, offset = memoryview(buffer), info.start_bytes + start
        descriptor = self._descriptor(info.file)
        with reading(info.file, CheckpointError):
            _read_into(descriptor, view, offset, info)
        return buffer

    def row_chunks(self, name: str, chunk_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor as pieces (first row, rows (n, columns)) of at most `chunk_bytes`; n >= 1."""
        n_rows, columns = self.tensors[name].matrix_shape
        step = max(1, chunk_bytes // max(1, columns * self.tensors[name].itemsize))
        for start in range(0, n_rows, step):
            yield start, self.rows(name, start, min(n_rows, start + step))

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor as it is held: in its stored dtype and shape, or as bits (`dtypes.BITS`)."""
        info = self.tensors[name]
        whole = self.rows(name, 0, info.matrix_shape[0])
        return whole.reshape(held_shape(info.dtype, info.shape))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files on disk."""
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def side_files(self) -> list[Path]:
        """Config, tokenizer, templates, code: all that is small beside the weights, by name."""
        return [self.path / name for name in self._contents.beside]

    def side_file(self, file: Path) -> bytes:
        """The content of one of them. Raises CheckpointError where it cannot be read."""
        with reading(file, CheckpointError):
            return file.read_bytes()

    @property
    def left_out(self) -> list[dict[str, object]]:
        """Files that are not taken along, each with the reason, as records hold them."""
        return [each.to_json() for each in self._contents.left_out]

    @property
    def total_bytes(self) -> int:
        """What the checkpoint takes on disk: weights, index, and the side files."""
        index = self.path / INDEX_FILE
        extra = index.stat().st_size if index.is_file() else 0
        return self.weight_bytes + extra + sum(file.stat().st_size for file in self.side_files)

    def fingerprint(self) -> str:
        """Identity of the files as they lie there: names, sizes, times, headers, samples of each tensor.

        Good enough to tell that unfinished work was begun on the same inputs: other weights are seen
        where size and time were kept, too. A tensor of up to 64 KiB is read whole, of a larger one
        eight pieces of 4 KiB, at places that its size alone decides. What changes nothing else but a
        few values in between, and keeps the time, is not seen.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            with reading(shard, CheckpointError):
                stat = shard.stat()
            digest.update(f"{self.relative(shard)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for info in self.tensors.values():
            digest.update(f"{info.name} {info.dtype} {info.shape} {info.start_bytes}\n".encode())
            for start, stop in _sampled(info.n_bytes):
                digest.update(self._data(info, start, stop))
        for file in self.side_files:
            digest.update(self.relative(file).encode() + self.side_file(file))
        return digest.hexdigest()[:32]

    def config(self) -> dict[str, Any]:
        """`config.json` as a dictionary; empty if there is none. Raises CheckpointError."""
        return read_config(self.path)


def _sampled(n_bytes: int) -> list[tuple[int, int]]:
    """The pieces of a tensor that a fingerprint reads: all of it, or some from start to end."""
    if n_bytes <= WHOLE_BYTES:
        return [(0, n_bytes)]
    last = n_bytes - SAMPLE_BYTES
    starts = [last * number // (SAMPLES - 1) for number in range(SAMPLES)]
    return [(start, start + SAMPLE_BYTES) for start in starts]


def as_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these bytes and any shape, without a copy; `dtype` as in the header."""
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)


@cache
def _opened_elsewhere(path: Path, label: str, fingerprint: str) -> Checkpoint:
    """A checkpoint that came pickled from another process, opened here once and for all.

    Raises ClusterError if other files lie there.
    """
    try:
        found = Checkpoint(path, label)
        if found.fingerprint() == fingerprint:
            return found
    except (CheckpointError, OSError):
        pass
    raise not_shared(path)


def _read_into(descriptor: int, view: memoryview, offset: int, info: TensorInfo) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CheckpointError(
                f"{info.file} ends inside tensor {info.name}; copy or download it again."
            )
        view, offset = view[count:], offset + count


def _contents(path: Path, label: str) -> Contents:
    """What lies at a path. Raises CheckpointError, which says what it is if it is no checkpoint."""
    if path.is_file():
        return Contents(weights=[path.name])
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a safetensors file; check the path.")
    refuse_archive(path, label)
    if (path / "blobs").is_dir() and (path / "snapshots").is_dir():
        raise CheckpointError(
            f"{path} is the hub's cache of a repository; give one of the folders in "
            f"{path / 'snapshots'}."
        )
    with reading(path, CheckpointError):
        found = read_contents(path, _weight_map)
    if not found.weights:
        raise CheckpointError(f"{path} holds no .safetensors file; {_hint(found)}.")
    for name in found.weights:
        if not is_plain_path(name):
            raise CheckpointError(
                f"{str(path / name)!r} has a name that is no plain file name; rename it."
            )
    return found


def _hint(found: Contents) -> str:
    names = [each.name for each in found.left_out]
    for suffix, words in _OTHER_FORMATS.items():
        if file := next((name for name in names if name.lower().endswith(suffix)), None):
            return f"it has {file}, {words}"
    if folder := next((each.name for each in found.left_out if each.name.endswith("/")), None):
        return f"is {folder.rstrip('/')} what you mean? Then give that folder"
    return "point at the folder that holds model.safetensors"


_PICKLE = "a pickle, which is not read: save the model with safe_serialization first"
_OTHER_FORMATS = {
    ".bin": _PICKLE,
    ".pt": _PICKLE,
    ".pth": _PICKLE,
    ".ckpt": _PICKLE,
    ".gguf": "which is not read: give the safetensors that it was made from",
    ".onnx": "which is not read: give the safetensors that it was made from",
}
# How files begin that are often given in place of a safetensors file.
_BEGINNINGS = {
    b"GGUF": "is a GGUF file; give the safetensors that it was made from",
    b"PK\x03\x04": "is a pickle, which is not read; save the model with safe_serialization first",
    b"\x80\x02": "is a pickle, which is not read; save the model with safe_serialization first",
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file with git lfs pull",
    b"<!DOCTYPE": "is a web page, not the file that was asked for; download it again",
}


def _refuse_other_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(32)
    except OSError:
        return  # the reader of headers says why
    if beginning[8:9] == b"{":
        return  # a header of 640 bytes begins as a pickle does
    for mark, words in _BEGINNINGS.items():
        if beginning.startswith(mark):
            raise CheckpointError(f"{path} {words}.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        with reading(index, CheckpointError):
            text = index.read_bytes()
        mapping = json.loads(text)["weight_map"]
        names = set(mapping.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index of weights ({error!r}); put a proper one in its place."
        ) from None
    for name in names:
        if Path(str(name)).name != name:
            raise CheckpointError(
                f"{index} names a shard outside its folder ({name!r}); it is not to be trusted."
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r}, which is no safetensors file; save the model with "
                "safe_serialization first."
            )
    return dict(mapping)


def _check_index(path: Path, index: str, tensors: dict[str, TensorInfo]) -> None:
    place = folder_of(index)
    for name, file in _weight_map(path / index).items():
        if place + name not in tensors:
            raise CheckpointError(
                f"{path / place / file} does not hold tensor {name}, which the index promises; "
                "copy or download the checkpoint again."
            )
