"""Models in an object store: an address like `s3://bucket/math` in place of a path, through fsspec.

What is read is fetched once into `stores` of deltafold's cache, file by file, and read there; files
that have changed in the store are another version, fetched anew. What is written is made in `outputs`
of that cache and stored when it is whole, the file last that makes a folder a model.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import functools
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from deltafold.checkpoint import disk
from deltafold.checkpoint.contents import is_plain_path
from deltafold.checkpoint.noted import keep_files, note_path
from deltafold.errors import (
    CheckpointError,
    DeltafoldError,
    StorageError,
    StorageWarning,
    UsageError,
)
from deltafold.foreign import blamed

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?!/)(.+)")
LAST = ("delta.json", "config.json", "adapter_config.json")
"""Files that make a folder a model: they are stored after the others."""


def is_address(source: str | Path) -> bool:
    """Whether this is written like `s3://bucket/name`; a Path makes one slash of two.

    >>> is_address("s3://bucket/base"), is_address(Path("s3://bucket/base")), is_address("org/name")
    (True, True, False)
    """
    return _ADDRESS.fullmatch(str(source)) is not None


def address_of(source: str | Path) -> str:
    """The address as it was typed, without a slash at the end."""
    found = _ADDRESS.fullmatch(str(source))
    assert found is not None
    return f"{found[1]}://{found[2].rstrip('/')}"


def shown(place: str | Path) -> str:
    """A path or an address as a person writes it."""
    return address_of(place) if is_address(place) else str(place)


def cache_root() -> Path:
    """DELTAFOLD_CACHE, else `~/.cache/deltafold`; a folder for this process if that cannot be written."""
    root = os.environ.get("DELTAFOLD_CACHE") or Path.home() / ".cache" / "deltafold"
    return _writable(Path(root).expanduser())


@functools.cache
def _writable(root: Path) -> Path:
    """The folder, if files can be made in it; else, with a word, one that lasts as long as this process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
        return root
    except OSError as error:
        warnings.warn(
            f"The cache {root} cannot be written ({error.strerror}), so nothing is kept for the next "
            "run; set DELTAFOLD_CACHE to a folder that can be.",
            StorageWarning,
            stacklevel=3,
        )
    own = Path(tempfile.mkdtemp(prefix="deltafold-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


@dataclass(frozen=True)
class Remote:
    """An address, and the file system that serves it."""

    address: str
    files: Any
    root: str

    @classmethod
    def at(cls, source: str | Path) -> Remote:
        """Raises UsageError for a kind of store that is not known, or whose package is missing."""
        address = address_of(source)
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(address)
        except ImportError as error:  # says which package
            raise UsageError(f"{address}: {str(error).rstrip('.')}, with pip.") from None
        except Exception as error:  # each store has its own; the user needs one sentence
            raise UsageError(f"{address} cannot be opened: {_words(error)}.") from None
        return cls(address, files, root.rstrip("/"))

    def fetch(self, patterns: Sequence[str]) -> Path:
        """The local copy of a folder's files that fit `patterns`, or of one file.

        Raises CheckpointError where there is none, or the store does not give it.
        """
        with self._plainly(CheckpointError):
            self.files.invalidate_cache()
            if self.files.isfile(self.root):
                wanted = {PurePosixPath(self.root).name: self.root}
            else:
                # Some stores list paths that begin with a slash, some do not.
                cut = len(self.root.strip("/")) + 1
                found = {path.strip("/")[cut:]: path for path in self.files.find(self.root)}
                wanted = {
                    name: path
                    for name, path in sorted(found.items())
                    if any(_fits(name, each) for each in patterns)
                }
            marks = [(name, str(self.files.ukey(path))) for name, path in wanted.items()]
        if not wanted:
            raise CheckpointError(
                f"{self.address} holds no checkpoint and no archive; check the address."
            )
        name = PurePosixPath(self.root).name
        folder = cache_root() / "stores" / _key(self.address, *map(str, marks)) / name
        one = len(wanted) == 1 and name in wanted
        files = {folder if one else folder / local: path for local, path in wanted.items()}
        keep_files(note_path(folder), files, self._fetch_file)
        return folder

    def _fetch_file(self, path: str, local: Path) -> None:
        from fsspec.callbacks import TqdmCallback

        local.parent.mkdir(parents=True, exist_ok=True)
        working = local.with_name(f"{local.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        bar = {"desc": local.name, "unit": "B", "unit_scale": True, "disable": None}
        with self._plainly(CheckpointError):
            try:
                self.files.get_file(path, str(working), callback=TqdmCallback(tqdm_kwargs=bar))
                disk.sync(working)
                disk.rename(working, local)
            finally:
                working.unlink(missing_ok=True)

    def exists(self) -> bool:
        with self._plainly(StorageError):
            self.files.invalidate_cache()
            return bool(self.files.exists(self.root))

    def store(self, made: Path) -> None:
        """Copy a folder or a file there; what else lay in that folder is removed.

        While it is under way the folder lacks the files that make it a model.
        """
        if made.is_file():
            with self._plainly(StorageError):
                self._put(made, self.root)
            return
        files = {
            f"{self.root}/{each.relative_to(made).as_posix()}": each
            for each in sorted(made.rglob("*"))
            if each.is_file()
        }
        last = [path for path in files if path.rpartition("/")[2] in LAST]
        with self._plainly(StorageError):
            there = self.files.find(self.root) if self.files.exists(self.root) else []
            old = {path.lstrip("/"): path for path in there}
            for path in (each for key, each in old.items() if key.rpartition("/")[2] in LAST):
                self.files.rm_file(path)
            for path in [each for each in files if each not in last]:
                self._put(files[path], path)
            stale = set(old) - {path.lstrip("/") for path in files}
            for path in (old[key] for key in stale if key.rpartition("/")[2] not in LAST):
                self.files.rm_file(path)
            for path in last:
                self._put(files[path], path)

    def _put(self, local: Path, path: str) -> None:
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(local), path)

    @contextlib.contextmanager
    def _plainly(self, kind: type[DeltafoldError]) -> Iterator[None]:
        """What a store raises, as one sentence."""
        try:
            yield
        except FileNotFoundError:
            raise kind(f"{self.address} does not exist; check the address.") from None
        except Exception as error:
            raise blamed(
                error,
                kind(
                    f"{self.address}: the store does not answer as it should ({_words(error)}); check "
                    "address, network and credentials."
                ),
            ) from error


@contextlib.contextmanager
def output_of(output: str | Path, overwrite: bool) -> Iterator[Path]:
    """Where to make an output: there, or for an address in the cache, to be stored at the end.

    Its record, `NAME.record.json` beside it, is stored as well. Where storing fails, what was made
    stays. Raises UsageError for an address where something lies already, StorageError.
    """
    if not is_address(output):
        yield Path(output)
        return
    remote = Remote.at(output)
    name = PurePosixPath(remote.root).name
    if not overwrite and remote.exists():
        raise UsageError(f"{remote.address} exists; choose another output or add --overwrite.")
    folder = cache_root() / "outputs" / _key(remote.address)
    made, record = folder / name, folder / f"{name}.record.json"
    if made.exists():
        raise UsageError(
            f"{made} was made for {remote.address} and could not be stored; store it, or remove it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    yield made
    if not made.exists():  # a dry run
        return
    try:
        remote.store(made)
        if record.is_file():
            Remote.at(f"{remote.address}.record.json").store(record)
    except StorageError as error:
        raise StorageError(f"{error} What was made lies in {made}.") from error
    shutil.rmtree(folder)


def _fits(name: str, pattern: str) -> bool:
    """A file's name within its folder against a pattern, as the hub does it; nothing hidden fits.

    A star stands for folders too, so a pattern such as `*.json` is for any folder.
    """
    if not is_plain_path(name):
        return False
    file = name.rpartition("/")[2]
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(file, pattern)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _words(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
