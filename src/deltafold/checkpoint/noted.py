"""Files that cannot carry a seal of their own: their digests are noted in a sealed file beside them.

    NAME/...             a folder of an earlier step, or one that a cache keeps
    NAME.noted.json      {"value": ..., "files": {"config.json": [size, times, digest], ...}}

The note is written after the files are synced. What is not as it was noted is as good as absent.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltafold.checkpoint import disk, sealed
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import StorageWarning

Note = list[int | str]
"""Size, inode, times of content and of entry in ns, SHA-256."""
_CHUNK_BYTES = 1 << 22


def note_of(file: Path) -> Note:
    """What a file is like. Raises OSError."""
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return [*_stamp(file), digest.hexdigest()]


def is_as_noted(file: Path, note: Note | None, look: bool = True) -> bool:
    """Whether a file is what was noted: its size always, then its content.

    Without `look`, content is read only where times or inode are others: for what takes long to read.
    """
    try:
        stamp = _stamp(file)
        if note is None or stamp[0] != note[0]:
            return False
        return (not look and stamp == note[:-1]) or note_of(file)[-1] == note[-1]
    except OSError:
        return False


def note_path(folder: Path) -> Path:
    """Where the note of a folder lies."""
    return folder.with_name(f"{folder.name}.noted.json")


def save_note(folder: Path, value: Any) -> None:
    """Note all that lies in a folder, and a JSON value with it. Raises StorageError."""

    def noted() -> dict[str, Note]:
        disk.sync_tree(folder)
        return {name: note_of(file) for name, file in _files(folder).items()}

    sealed.save_json(note_path(folder), {"value": value, "files": guard_storage(folder, noted)})


def take_up_folder(folder: Path) -> Any | None:
    """The value that was noted with a folder, if all in it is as it was; else folder and note go."""
    path = note_path(folder)
    if sealed.take_up(path):
        found = sealed.load_json(path)
        files = _files(folder) if folder.is_dir() else {}
        wrong = [name for name in {*files, *found["files"]} if not _fits(files, found, name)]
        if not wrong:
            return found["value"]
        warnings.warn(
            f"{folder / min(wrong)}, of an earlier run, is damaged or missing; {folder} is made again.",
            StorageWarning,
            stacklevel=2,
        )
    guard_storage(folder, lambda: disk.remove(folder))
    guard_storage(path, lambda: disk.remove(path))
    return None


def keep_files(path: Path, files: Mapping[Path, str], fetch: Callable[[str, Path], None]) -> None:
    """Fetch those of some files that are not as the note at `path` says, and note them.

    `fetch` is given where a file comes from, and the file. They may be large: content is read where
    times or inode are others than noted, as they are when anything has written there.
    """
    known = sealed.load_json(path) if sealed.take_up(path) else {}
    notes: dict[str, Note] = {}
    for file, source in files.items():
        key = str(file.relative_to(path.parent))
        note = known.get(key)
        if not is_as_noted(file, note, look=False):
            if note is not None and file.exists():
                warnings.warn(
                    f"{file} is damaged; it is fetched again.", StorageWarning, stacklevel=2
                )
            fetch(source, file)
        notes[key] = note_of(file) if note is None or _stamp(file) != note[:-1] else note
    if notes != known:
        sealed.save_json(path, notes)


def _fits(files: dict[str, Path], found: dict[str, Any], name: str) -> bool:
    return name in files and is_as_noted(files[name], found["files"].get(name))


def _files(folder: Path) -> dict[str, Path]:
    found = (each for each in sorted(folder.rglob("*")) if each.is_file())
    return {each.relative_to(folder).as_posix(): each for each in found}


def _stamp(file: Path) -> Note:
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
