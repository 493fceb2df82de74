"""Calibration on disk: a folder of safetensors, one file a block, and an index.

    KEY/samples.json            token ids, and where counting starts
    KEY/block-00000.safetensors 0.second (i, i) or (i,), 0.mean (i,), 1.second, ...
    KEY/head.safetensors        the same for the head
    KEY/index.json              tensor -> file, entry, input axis, tokens; written last

Files are sealed (`checkpoint/sealed.py`), and the index is bound to the others: what was damaged
since is measured again. Unfinished work has no index: what is there and whole is kept.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.batches import Sample
from deltafold.checkpoint import cache_root, sealed
from deltafold.errors import StorageError, StorageWarning
from deltafold.linalg.matrices import Moments

INDEX, SAMPLES = "index.json", "samples.json"
Place = dict[str, Any]
"""Where the moments of a tensor lie: `file`, `entry`, `input_axis`, `tokens`, `full`."""


def cache_folder(cache: str | Path | None) -> Path:
    """What is given, else `calibration` in DELTAFOLD_CACHE or in `~/.cache/deltafold`."""
    if cache is not None:
        return Path(cache).expanduser()
    return cache_root() / "calibration"


def key_of(identity: object) -> str:
    """A short name for what a result was made from."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def keep(what: str, action: Callable[[], None]) -> None:
    """Keep what is known anyway; that it cannot be kept is a warning."""
    try:
        action()
    except StorageError as error:
        warnings.warn(f"{what} is not kept for the next run: {error}", StorageWarning, stacklevel=2)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Token ids as sealed JSON."""
    sealed.save_json(path, [{"ids": each.ids, "start": each.start} for each in samples])


def read_samples_file(path: Path) -> list[Sample] | None:
    """The samples of a file; None where there are none, or they are damaged."""
    if not sealed.take_up(path):
        return None
    rows = sealed.load_json(path)
    return [Sample(tuple(map(int, row["ids"])), int(row["start"])) for row in rows] or None


def write_entries(path: Path, entries: Sequence[Moments], places: dict[str, Place]) -> None:
    """One block's moments, and which tensor has which, as one sealed safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    for number, moments in enumerate(entries):
        tensors |= {f"{number}.second": moments.second, f"{number}.mean": moments.mean}
    sealed.save_tensors(path, tensors, {"places": json.dumps(places)})


def read_places(path: Path) -> dict[str, Place] | None:
    """Which tensors a file has moments of; None where it is missing or damaged."""
    if not sealed.take_up(path):
        return None
    with sealed.open_tensors(path) as file:
        places: dict[str, Place] = json.loads(file.metadata["places"])
    return places


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """What all the files of a folder are; it stands with them, as they are now."""
    files = [folder / name for name in {place["file"]: 0 for place in index["tensors"].values()}]
    sealed.save_json(folder / INDEX, index, of=[folder / SAMPLES, *files])


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder; None where there is none, or something that it speaks of is damaged."""
    return sealed.load_json(folder / INDEX) if sealed.take_up(folder / INDEX) else None


def read_entry(folder: Path, place: Place) -> Moments:
    """The moments that lie at a place. Raises StorageError if the file is damaged."""
    with sealed.open_tensors(folder / place["file"]) as file:
        return Moments(
            file.tensor(f"{place['entry']}.second"),
            file.tensor(f"{place['entry']}.mean"),
            place["tokens"],
        )
