"""What the inputs of every layer look like: second moments, taken block by block.

    finetuned, text -> samples -> blocks, one at a time -> E[x x^T], E[x] of every matrix's inputs x

All tokens of a sample count, those of prompts too. Batches hold samples of one length, so that there
is no padding to leave out. The result is kept on disk by what it was made from, and found again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltafold.calibration.batches import Sample
from deltafold.calibration.gather import AnyText, as_sampling, gather_samples
from deltafold.calibration.kept import (
    INDEX,
    SAMPLES,
    Place,
    cache_folder,
    key_of,
    read_entry,
    read_index,
    write_index,
    write_samples,
)
from deltafold.calibration.measure import measure
from deltafold.calibration.stream import StreamedModel, default_memory_bytes
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import not_shared
from deltafold.linalg.matrices import Moments
from deltafold.running.devices import identity
from deltafold.running.engine import Progress
from deltafold.running.memory import Meter

VERSION = 1


class Calibration:
    """Samples, and the moments of every matrix's inputs, read from disk when asked for."""

    def __init__(self, folder: Path, samples: list[Sample], index: dict[str, Any]):
        self.folder, self.samples = folder, samples
        self._index = index
        self._places: dict[str, Place] = index["tensors"]

    def __reduce__(self) -> tuple[Callable[..., Calibration], tuple[Any, ...]]:
        return _found_elsewhere, (self.folder.absolute(), self.samples, self._index)

    @property
    def names(self) -> list[str]:
        """Checkpoint tensors that have moments."""
        return list(self._places)

    def moments(self, name: str) -> Moments | None:
        """Moments of the inputs that a checkpoint tensor is multiplied with; None if unknown.

        Unknown are tensors that are no matrices, and experts that no sample reached.
        """
        place = self._places.get(name)
        return None if place is None else read_entry(self.folder, place)

    def input_axis(self, name: str) -> int:
        """The axis of the stored tensor that the inputs run along: 1, but 0 for GPT-2's layers."""
        return int(self._places[name]["input_axis"])

    def summary(self) -> dict[str, Any]:
        """What a record says of a calibration."""
        return {key: value for key, value in self._index.items() if key != "tensors"}


def _found_elsewhere(folder: Path, samples: list[Sample], index: dict[str, Any]) -> Calibration:
    """A calibration that came pickled from another process. Raises ClusterError if it is not there."""
    if not (folder / INDEX).is_file():
        raise not_shared(folder)
    return Calibration(folder, samples, index)


def calibrate(
    finetuned: str | Path,
    text: AnyText,
    *,
    full: bool = True,
    memory_bytes: int | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> Calibration:
    """Run text through the fine-tune, and measure the inputs of every matrix.

    `full=False` keeps diagonals only, and so does a layer whose full moment does not fit
    `memory_bytes`. `restart` measures again what is found on disk. Raises DeltafoldError.

    >>> calibration = calibrate("math/", "math.jsonl")                          # doctest: +SKIP
    >>> calibration.moments("model.layers.0.mlp.up_proj.weight").second.shape   # doctest: +SKIP
    torch.Size([576, 576])
    """
    allowance = memory_bytes or default_memory_bytes()
    root = cache_folder(cache)
    guard_storage(root, lambda: root.mkdir(parents=True, exist_ok=True))
    model = StreamedModel(finetuned, memory_bytes=allowance // 2, scratch=root)
    with Meter() as meter, contextlib.closing(model.checkpoint):
        chosen = gather_samples(model, text, memory_bytes=allowance, cache=root, restart=restart)
        folder = root / key_of(
            {
                "version": VERSION,
                "finetuned": model.checkpoint.fingerprint(),
                "samples": [(each.ids, each.start) for each in chosen],
                "full": full,
                "moments_bytes": allowance // 2 if full else 0,
                **identity(),
            }
        )
        if not restart and (index := read_index(folder)) is not None:
            return Calibration(folder, chosen, index)
        write_samples(folder / SAMPLES, chosen)
        places = measure(model, chosen, folder, full, allowance // 2, progress, again=restart)
    index = {
        "source": as_sampling(text).name,
        "seed": as_sampling(text).seed,
        **_totals(chosen, places, folder),
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "tensors": places,
    }
    write_index(folder, index)
    return Calibration(folder, chosen, index)


def _totals(samples: Sequence[Sample], places: dict[str, Place], folder: Path) -> dict[str, Any]:
    entries = {(each["file"], each["entry"]): each["full"] for each in places.values()}
    return {
        "samples": len(samples),
        "tokens": sum(len(each.ids) for each in samples),
        "counted_tokens": sum(each.counted for each in samples),
        "tensors_measured": len(places),
        "full_moments": sum(entries.values()),
        "diagonal_moments": len(entries) - sum(entries.values()),
        "disk_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
