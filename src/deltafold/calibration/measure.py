"""The pass that measures: moments of each block's matrices, written as soon as a block is done."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from deltafold.calibration.accumulate import Entries, Watch
from deltafold.calibration.batches import Sample, make_batches
from deltafold.calibration.kept import Place, read_places, write_entries
from deltafold.calibration.precision import settled
from deltafold.calibration.stream import Pass, StreamedModel
from deltafold.errors import NonFiniteError
from deltafold.running.engine import Progress, Step

HEAD = "head.safetensors"


class Measurement:
    """A visitor of blocks that leaves one file a block in `folder`.

    Files that are there already are kept: an interrupted run computes hidden states again, but not
    what it has written. `allowance_bytes` is for the sums of one block.
    """

    def __init__(
        self,
        model: StreamedModel,
        folder: Path,
        full: bool,
        allowance_bytes: int,
        progress: Progress | None,
        again: bool = False,
    ):
        self.model, self.folder, self.progress = model, folder, progress
        self.full, self.allowance_bytes, self.again = full, allowance_bytes, again
        self.places: dict[str, Place] = {}
        self._entries: Entries | None = None
        self._written_bytes = 0

    def running(
        self, number: int, parameters: dict[str, nn.Parameter]
    ) -> contextlib.AbstractContextManager[object]:
        """Watch a block at work, unless it was measured before."""
        if self._entries is None and self._is_there(_file(number)):
            return contextlib.nullcontext()
        self._entries = self._entries or Entries(self.full, self.allowance_bytes)
        return Watch(self._entries, parameters, self.model.skeleton.matrix_names)

    def finished(self, number: int) -> None:
        """Write what was seen of a block."""
        self._close(_file(number), self.model.skeleton.block_names[number], number + 1)

    @torch.no_grad()
    def head(self, done: Pass) -> None:
        """Measure what enters the head. Its logits are not computed."""
        weight = self.model.skeleton.head_weight()
        if not self._is_there(HEAD):
            self._entries = Entries(self.full, self.allowance_bytes)
            unused = () if weight is None else (weight,)
            with self.model.head() as (head, parameters):
                for place, batch in enumerate(done.batches):
                    for _, rows in self.model.parts(done.last[place][batch.real]):
                        with Watch(
                            self._entries, parameters, self.model.skeleton.matrix_names, unused
                        ):
                            head(rows)
        self._close(HEAD, "head", self.model.n_blocks + 1)

    def _is_there(self, file: str) -> bool:
        return not self.again and read_places(self.folder / file) is not None

    def _close(self, file: str, name: str, done: int) -> None:
        path = self.folder / file
        if self._entries is not None:
            places = self._places_of(self._entries, file)
            found = [each.moments() for each in self._entries.sums]
            if not all(each.second.isfinite().all() for each in found):
                raise NonFiniteError(
                    f"{self.model.label} gives NaN or infinite values in {name}; its weights are "
                    "damaged."
                )
            write_entries(path, found, places)
            self._entries = None
        self.places |= read_places(path) or {}
        self._written_bytes += path.stat().st_size
        if self.progress:
            total = self.model.n_blocks + 1
            self.progress(Step("calibrate", name, done, total, self._written_bytes))

    def _places_of(self, entries: Entries, file: str) -> dict[str, Place]:
        """Places of the tensors whose stored shape has the inputs along the axis that was seen."""
        places: dict[str, Place] = {}
        for name, entry in sorted(entries.of_tensor.items()):
            sums, axis = entries.sums[entry], entries.axes[name]
            if self.model.checkpoint.tensors[name].matrix_shape[axis] == len(sums.first):
                places[name] = {
                    "file": file,
                    "entry": entry,
                    "input_axis": axis,
                    "tokens": sums.tokens,
                    "full": sums.full,
                }
        return places


def measure(
    model: StreamedModel,
    samples: Sequence[Sample],
    folder: Path,
    full: bool,
    allowance_bytes: int,
    progress: Progress | None,
    again: bool = False,
) -> dict[str, Place]:
    """Measure all blocks and the head into `folder`; where each tensor's moments lie.

    `again`: also what is there. Files are replaced one by one, under the eyes of who reads them.
    """
    measurement = Measurement(model, folder, full, allowance_bytes, progress, again)
    batches = make_batches(samples, padded=False)
    model = measurement.model = settled(model, samples)
    with model.forward(batches, visitor=measurement) as done:
        measurement.head(done)
    return measurement.places


def _file(number: int) -> str:
    return f"block-{number:05d}.safetensors"
