"""What text run through the fine-tune tells `compress`: moments, what errors cost, samples to train on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltafold.checkpoint import Checkpoint
from deltafold.codecs import get
from deltafold.compressing.request import CompressRequest
from deltafold.errors import DeltafoldError, UsageError
from deltafold.lazy import torch
from deltafold.linalg.matrices import Fisher

if TYPE_CHECKING:
    from deltafold.calibration.batches import Sample
    from deltafold.calibration.gather import Sampling
    from deltafold.calibration.moments import Calibration

NONE, GENERAL, SELF = "none", "general", "self"
_NEEDED = ("config.json", "tokenizer*", "*.model", "vocab*", "*.tiktoken", "tekken.json", "*.spm")


@dataclass(frozen=True)
class Distillation:
    """Steps of training, and the samples to train on."""

    steps: int
    samples: list[Sample]

    def identity(self) -> dict[str, Any]:
        """What unfinished work is bound to."""
        from deltafold.calibration.kept import key_of

        return {
            "steps": self.steps,
            "samples": key_of([(each.ids, each.start) for each in self.samples]),
            "threads": torch.get_num_threads(),  # the order of sums
        }


@dataclass
class Evidence:
    """What is known beside the weights. `why` says why an asked-for or usual thing is not."""

    source: str | None = None
    calibration: Calibration | None = None
    distillation: Distillation | None = None
    information: Mapping[str, Fisher] | None = None
    why: str | None = None

    def to_record(self) -> dict[str, Any]:
        """For the record of a run."""
        told: dict[str, Any] = {"source": self.source}
        if self.calibration is not None:
            told["moments"] = self.calibration.summary()
        if self.information:
            told["matrices_weighed"] = len(self.information)
        return told | ({"why": self.why} if self.why else {})


def gather_evidence(
    request: CompressRequest, finetuned: Checkpoint, wrapped: bool = False
) -> Evidence:
    """Run the text that was asked for: a source as in `calibration.gather_samples`, `none`, or None.

    None stands for what is usual: `general` for a method that asks what errors cost, else nothing.
    `wrapped`: the fine-tune's names carry words of a wrapper, so that it cannot be run unasked. Raises
    DeltafoldError, but only `StorageError` for text that nobody asked for.
    """
    source, codec = request.calibration, get(request.method)
    if source is None and request.steps:
        source = SELF
    if str(source) == NONE:
        if request.steps:
            raise UsageError("--steps trains on text; drop --calibration none.")
        return Evidence()
    if source is None and wrapped and codec.uses_fisher:
        return Evidence(why="a wrapper's names keep the fine-tune from being run")
    if source is None:
        return _usual(request, finetuned) if codec.uses_fisher else Evidence()
    from deltafold.calibration.gather import Sampling  # torch, and seconds to import

    found = Evidence(str(source))
    text = Sampling(source, request.samples, request.max_tokens)
    if codec.uses_fisher:
        found.information = _weigh(request, finetuned, text)
    if codec.uses_moments:
        from deltafold.calibration.moments import calibrate  # transformers: seconds to import

        found.calibration = calibrate(
            finetuned.path, text, memory_bytes=request.memory_bytes, progress=request.progress,
            restart=request.restart,
        )  # fmt: skip
    if request.steps and found.calibration is not None:
        found.distillation = Distillation(request.steps, found.calibration.samples)
    elif request.steps:
        found.distillation = find_distillation(request, finetuned.path, text)
    return found


def _usual(request: CompressRequest, finetuned: Checkpoint) -> Evidence:
    """What the text that comes with deltafold tells, if the fine-tune can be run at all."""
    folder = finetuned.path
    if not (folder / _NEEDED[0]).is_file() or not any(
        next(folder.glob(pattern), None) for pattern in _NEEDED[1:]
    ):
        return Evidence(why="the fine-tune has no config or no tokenizer")
    try:
        from deltafold.calibration.gather import Sampling

        return Evidence(GENERAL, information=_weigh(request, finetuned, Sampling(GENERAL)))
    except (DeltafoldError, ImportError) as error:
        if isinstance(error, DeltafoldError) and error.passing:
            raise  # another archive would come of it
        return Evidence(why=f"the fine-tune cannot be run: {error}")


def _weigh(request: CompressRequest, finetuned: Checkpoint, text: Sampling) -> Mapping[str, Fisher]:
    from deltafold.calibration.fisher import measure_fisher

    return measure_fisher(
        finetuned.path, text, memory_bytes=request.memory_bytes, progress=request.progress,
        restart=request.restart,
    )  # fmt: skip


def find_distillation(
    request: CompressRequest, finetuned: str | Path, text: Sampling
) -> Distillation:
    """Samples for a method that takes no moments: those that `calibrate` would take."""
    from deltafold.calibration.gather import gather_samples
    from deltafold.calibration.stream import StreamedModel

    memory_bytes = request.memory_bytes
    model = StreamedModel(finetuned, memory_bytes=memory_bytes)
    with contextlib.closing(model.checkpoint):
        found = gather_samples(model, text, memory_bytes=memory_bytes, restart=request.restart)
    return Distillation(request.steps, found)
