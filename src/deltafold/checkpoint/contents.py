"""Which files of a folder are the model: its weights, and everything small that lies beside them.

    model.safetensors              weights                 1_Pooling/config.json      beside
    config.json, tekken.json       beside                  2_Dense/model.safetensors  weights
    pytorch_model.bin, optimizer.pt, onnx/model.onnx, checkpoint-500/                 left out

Weights are safetensors files: of each folder those that its own library would read. What is left
out has a name and a reason, so that a run can say it.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from deltafold.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
STEMS = ("model", "diffusion_pytorch_model")
"""What weight files are called by transformers, and by diffusers."""
ARCHIVE_FILE = "delta.json"

MAX_SIDE_FILE_BYTES = 128_000_000
MAX_FILES = 20_000
MAX_DEPTH = 8

# What a file may be called: no path, not hidden, no control characters, room for a suffix.
_NAME = r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,239}"
# The same, in at most seven folders one inside the other; each of them a plain name.
PLAIN_PATH = rf"^(?:{_NAME}/){{0,7}}{_NAME}$"

# Weights in other formats, the state of a training run, pickles, packed folders: never taken along.
FOREIGN = (
    "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.joblib", "*.ckpt*", "*.distcp", "*.onnx*",
    "*.gguf*", "*.ggml*", "*.llamafile", "*.h5", "*.hdf5", "*.keras", "*.msgpack", "*.npz",
    "*.pb", "*.tflite", "*.data-*-of-*", "*.ot", "*.params", "*.pdparams", "*.pdiparams",
    "*.mlmodel*", "*.mlpackage", "*.engine", "*.plan", "*.nemo", "*.pte", "*.zip", "*.tar", "*.tar.*",
    "*.tgz", "*.7z", "*.safetensors*",
)  # fmt: skip
_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack|pt|pth)\.index(\.[\w-]+)?\.json$", re.I)
_LOGS = ("*.tfevents.*", "*.log")
_TRAINING = re.compile(r"(checkpoint|global_step)-?\d+$")


@dataclass(frozen=True)
class LeftOut:
    """A file, or a folder with a slash at its end, that is not taken along."""

    name: str
    n_bytes: int
    why: str

    def to_json(self) -> dict[str, object]:
        """For the record of a run."""
        return {"name": self.name, "bytes": self.n_bytes, "why": self.why}


@dataclass
class Contents:
    """Relative names, with slashes, of a folder's weight files and of what lies beside them."""

    weights: list[str] = field(default_factory=list)
    indices: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def is_plain_path(name: str) -> bool:
    """True for a relative name that stays inside its folder and that any system can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return re.fullmatch(PLAIN_PATH, name) is not None


def is_foreign(name: str) -> bool:
    """True for a name of weights, of training state or of a pickle; not for an index of weights."""
    last = PurePosixPath(name).name.lower()
    if last.endswith(".json"):
        return False
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in FOREIGN)


def is_index(name: str) -> bool:
    """True for an index that says which file holds which tensor.

    >>> is_index("unet/diffusion_pytorch_model.safetensors.index.json"), is_index("config.json")
    (True, False)
    """
    return _INDEX.search(name) is not None


def folder_of(file: str) -> str:
    """What stands before the names of the tensors of a weight file: its folder and a slash.

    >>> folder_of("2_Dense/model.safetensors"), folder_of("model.safetensors")
    ('2_Dense/', '')
    """
    return file[: file.rfind("/") + 1]


def stem_of(files: Iterable[str]) -> str:
    """What the weight files of a folder, not of those inside it, are called.

    >>> stem_of(["diffusion_pytorch_model.safetensors"]), stem_of(["a.safetensors"]), stem_of([])
    ('diffusion_pytorch_model', 'model', 'model')
    """
    own = [file for file in files if "/" not in file]
    return next(
        (stem for stem in STEMS if own and all(each.startswith(stem) for each in own)), STEMS[0]
    )


def read_contents(folder: Path, weight_map: Callable[[Path], dict[str, str]]) -> Contents:
    """What a folder holds. `weight_map` reads an index. Raises CheckpointError."""
    found = Contents()
    files = list(_walk(folder, found))
    by_folder: dict[str, list[str]] = {}
    for name in files:
        by_folder.setdefault(folder_of(name), []).append(PurePosixPath(name).name)
    for place in sorted(by_folder):
        index, chosen = _weights(folder / place, by_folder[place], weight_map)
        found.weights += [place + name for name in chosen]
        found.indices += [place + index] if index else []
    taken = {name.casefold() for name in [*found.weights, INDEX_FILE]}
    for name in sorted(files):
        if name in found.weights or name == INDEX_FILE:
            continue
        size = (folder / name).stat().st_size
        if why := _why_not(name, size, taken, found.indices):
            found.left_out.append(LeftOut(_readable(name), size, why))
        else:
            found.beside.append(name)
    found.left_out.sort(key=lambda each: each.name)
    return found


def _walk(folder: Path, found: Contents) -> Iterator[str]:
    """Every visible file; hidden ones keep the accounts of a file system, of git or of the hub."""
    count = 0
    for place, folders, files in os.walk(folder, onerror=_refuse_unread):
        inside = Path(place).relative_to(folder)
        kept = []
        for name in sorted(each for each in folders if not each.startswith(".")):
            if why := _why_not_folder(Path(place) / name, inside):
                whole = (inside / name).as_posix() + "/"
                found.left_out.append(LeftOut(_readable(whole), _size(Path(place) / name), why))
            elif name != "__pycache__":
                kept.append(name)
        folders[:] = kept
        for name in files:
            if not name.startswith(".") and (Path(place) / name).is_file():
                yield (inside / name).as_posix()
        count += len(files)
        if count > MAX_FILES:
            raise CheckpointError(
                f"{folder} holds more than {MAX_FILES:,} files, so it is no model's folder; give "
                "the folder that holds the weights."
            )


def _refuse_unread(error: OSError) -> None:
    raise error  # a folder that cannot be listed is not an empty one


def _why_not_folder(folder: Path, inside: Path) -> str | None:
    if (folder / ARCHIVE_FILE).is_file() or folder.name.endswith(".partial"):
        return "an archive, or unfinished work"
    if _TRAINING.match(folder.name):
        return "a state of a training run"
    if folder.is_symlink():
        return "a link to another folder"
    return "too many folders deep" if len(inside.parts) + 1 >= MAX_DEPTH else None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _why_not(name: str, size: int, taken: Collection[str], indices: Collection[str]) -> str | None:
    """Why a file is left out; None for what is taken along."""
    if not is_plain_path(name):
        return "a name that not every system can hold"
    if name.lower().endswith(".safetensors"):
        return "weights that are not read beside the others"
    if is_foreign(name):
        return "weights in another format, training state or a pickle"
    if is_index(name) and name not in indices:
        return "an index of weights that are not read"
    if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _LOGS):
        return "a log of a training run"
    if name.casefold() in taken:
        return "a name that some systems cannot tell from a weight file's"
    if size > MAX_SIDE_FILE_BYTES:
        return f"larger than {MAX_SIDE_FILE_BYTES // 1_000_000} MB"
    return None


def _readable(name: str) -> str:
    """A name as a record can hold it, whatever bytes it is made of."""
    return name.encode("utf-8", "backslashreplace").decode() if name.isprintable() else repr(name)


def _weights(
    folder: Path, files: Collection[str], weight_map: Callable[[Path], dict[str, str]]
) -> tuple[str | None, list[str]]:
    """(index, weight files) of one folder, with the same precedence as transformers and diffusers."""
    for stem in STEMS:
        single = f"{stem}.safetensors"
        if single in files:
            return None, [single]
        if f"{single}.index.json" in files:
            names = sorted(set(weight_map(folder / f"{single}.index.json").values()))
            return f"{single}.index.json", names
    return None, sorted(name for name in files if name.endswith(".safetensors"))
