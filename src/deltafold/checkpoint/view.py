"""A checkpoint as the outside world has it: headers now, rows of tensors when asked.

Opening reads a few kilobytes a shard. Rows are read with `pread`, so any number of threads may read
at once, and memory holds only what was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from deltafold.checkpoint.header import TensorInfo, read_header
from deltafold.dtypes import DTYPES, held_shape
from deltafold.errors import CheckpointError, not_shared
from deltafold.lazy import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Files that a checkpoint needs beside its weights; all of them small.
SIDE_FILE_PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template*",
    "preprocessor_config.json", "processor_config.json", "*.py",
)  # fmt: skip
MAX_SIDE_FILE_BYTES = 128_000_000

# What a file may be called: no path, not hidden, no control characters, room for a suffix.
PLAIN_NAME = r"^[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,239}$"


class Checkpoint:
    """A local Hugging Face folder (or one safetensors file) of weights.

    >>> checkpoint = Checkpoint(Path("llama/"))                                 # doctest: +SKIP
    >>> checkpoint.tensors["model.norm.weight"].shape                           # doctest: +SKIP
    (4096,)
    """

    def __init__(self, path: Path, label: str | None = None):
        self.path = path
        self.label = label or str(path)
        self.shards = [_plainly_named(shard) for shard in _find_shards(path)]
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for shard in self.shards:
            tensors, metadata = read_header(shard)
            self.metadata |= metadata
            for name, info in tensors.items():
                if name in self.tensors:
                    first = self.tensors[name].file.name
                    raise CheckpointError(
                        f"{self.label} holds tensor {name} twice, in {first} and in {shard.name}; "
                        "remove the file that does not belong to it."
                    )
                self.tensors[name] = info
        _check_index(path, self.tensors)
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

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
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor seen as a matrix (see `TensorInfo.matrix_shape`).

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
        _read_into(self._descriptor(info.file), view, offset, info)
        return buffer

    def row_chunks(self, name: str, chunk_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor as (first row, rows) pieces of at most `chunk_bytes` (at least one row)."""
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
        """Config, tokenizer and the like, sorted by name."""
        if self.path.is_file():
            return []
        found = {
            file
            for pattern in SIDE_FILE_PATTERNS
            for file in self.path.glob(pattern)
            if _is_visible_file(file) and file.stat().st_size <= MAX_SIDE_FILE_BYTES
        }
        return sorted(map(_plainly_named, found), key=lambda file: file.name)

    @property
    def total_bytes(self) -> int:
        """What the checkpoint takes on disk: weights, index, and the side files."""
        index = self.path / INDEX_FILE
        extra = index.stat().st_size if index.is_file() else 0
        return self.weight_bytes + extra + sum(file.stat().st_size for file in self.side_files)

    def fingerprint(self) -> str:
        """Identity of the files as they lie there (names, sizes, times, headers); reads no weights.

        Good enough to tell that unfinished work was begun on the same inputs.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            stat = shard.stat()
            digest.update(f"{shard.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for info in self.tensors.values():
            digest.update(f"{info.name} {info.dtype} {info.shape} {info.start_bytes}\n".encode())
        for file in self.side_files:
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:32]

    def config(self) -> dict[str, object]:
        """`config.json` as a dictionary; empty if there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                return dict(json.loads((self.path / "config.json").read_text()))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path / 'config.json'} is not valid JSON ({error}); copy it again."
                ) from None
        return {}


def as_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these bytes, without a copy; `dtype` as in the header."""
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


def _find_shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a safetensors file; check the path.")
    if (path / SINGLE_FILE).is_file():  # the same precedence as transformers
        return [path / SINGLE_FILE]
    index = path / INDEX_FILE
    if index.is_file():
        return [path / name for name in sorted(set(_weight_map(index).values()))]
    shards = sorted(file for file in path.glob("*.safetensors") if _is_visible_file(file))
    if not shards:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        hint = (
            f"it has {pickled[0]}, a pickle, which is not read: save the model with "
            "safe_serialization first"
            if pickled
            else "point at the folder that holds model.safetensors"
        )
        raise CheckpointError(f"{path} holds no .safetensors file; {hint}.")
    return shards


def _is_visible_file(file: Path) -> bool:
    """False for folders and for hidden files: some systems leave `._name` beside each file."""
    return file.is_file() and not file.name.startswith(".")


def _plainly_named(file: Path) -> Path:
    if not re.fullmatch(PLAIN_NAME, file.name):
        raise CheckpointError(f"{str(file)!r} has a name that is no plain file name; rename it.")
    return file


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text())["weight_map"]
        names = set(mapping.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r}); copy it again.") from None
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


def _check_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    index = path / INDEX_FILE
    if not index.is_file() or (path / SINGLE_FILE).is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in tensors:
            raise CheckpointError(
                f"{path / file} does not hold tensor {name}, which the index promises; "
                "copy or download the checkpoint again."
            )
