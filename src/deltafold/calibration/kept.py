"""Calibration on disk: a folder of safetensors, one file a block, and an index.

    KEY/samples.json            token ids, and where counting starts
    KEY/block-00000.safetensors 0.second (i, i) or (i,), 0.mean (i,), 1.second, ...
    KEY/head.safetensors        the same for the head
    KEY/index.json              tensor -> file, entry, input axis, tokens; written last

Files land by rename. Unfinished work has no index: what is there is whole, and is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.batches import Sample
from deltafold.checkpoint import DTYPE_NAMES, Checkpoint, cache_root, tensor_bytes
from deltafold.checkpoint.header import build_header
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import DeltafoldError
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


def write_text(path: Path, text: str) -> None:
    """Write by rename. Raises StorageError."""
    working = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        working.write_text(text, encoding="utf-8")
        working.replace(path)

    guard_storage(path, write)


def read_json(path: Path) -> Any | None:
    """What a file holds; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Token ids as JSON, by rename."""
    write_text(path, json.dumps([{"ids": each.ids, "start": each.start} for each in samples]))


def read_samples_file(path: Path) -> list[Sample] | None:
    """The samples of a file; None where there are none, or they are damaged."""
    rows = read_json(path)
    try:
        return [
            Sample(tuple(map(int, row["ids"])), int(row["start"])) for row in rows or ()
        ] or None
    except (TypeError, KeyError, ValueError):
        return None


def write_entries(path: Path, entries: Sequence[Moments], places: dict[str, Place]) -> None:
    """One block's moments, and which tensor has which, as one safetensors file, by rename."""
    tensors: dict[str, torch.Tensor] = {}
    for number, moments in enumerate(entries):
        tensors |= {f"{number}.second": moments.second, f"{number}.mean": moments.mean}
    specs = [(name, DTYPE_NAMES[each.dtype], tuple(each.shape)) for name, each in tensors.items()]
    header, _ = build_header(specs, {"places": json.dumps(places)})
    working = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with working.open("wb") as out:
            out.write(header)
            for tensor in tensors.values():
                out.write(tensor_bytes(tensor))
        working.replace(path)

    guard_storage(path, write)


def read_places(path: Path) -> dict[str, Place] | None:
    """Which tensors a file has moments of; None where it is missing or damaged."""
    try:
        with Checkpoint(path) as file:
            places: dict[str, Place] = json.loads(file.metadata["places"])
    except (DeltafoldError, KeyError, ValueError):
        return None
    return places


def read_entry(folder: Path, place: Place) -> Moments:
    """The moments that lie at a place. Raises CheckpointError if the file is damaged."""
    with Checkpoint(folder / place["file"]) as file:
        return Moments(
            file.tensor(f"{place['entry']}.second"),
            file.tensor(f"{place['entry']}.mean"),
            place["tokens"],
        )
