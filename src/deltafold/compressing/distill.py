"""The step of `compress --steps N`: encoded pieces trained, and stored anew.

The closed-form parts stay in `lossy/`; trained ones go to `distilled/`, and only if training made
the predictions on held-out samples better.
"""

from __future__ import annotations

import time
from typing import Any

from deltafold.codecs import get, names
from deltafold.codecs.base import DeltaCodec
from deltafold.compressing.encode import relative_error
from deltafold.compressing.job import CompressJob
from deltafold.compressing.planned import Plan
from deltafold.compressing.student import PlanStudent
from deltafold.errors import UsageError
from deltafold.lazy import torch
from deltafold.running.engine import Resources, Step
from deltafold.running.workspace import Workspace, checksum

STATE = "distill/state.safetensors"
FEWEST = 8  # samples: one of them is held out


def check_distill(steps: int, method: str) -> None:
    """Raises UsageError if these steps cannot be run with this method."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise UsageError(f"--steps takes a number of steps, 0 or more, not {steps!r}.")
    if steps and not can_train(method):
        able = ", ".join(name for name in names() if can_train(name))
        raise UsageError(
            f"The method {method} stores nothing that --steps could train; leave out --steps, "
            f"or choose one of {able}."
        )


def can_train(method: str) -> bool:
    """True if a codec has parts that can be trained."""
    cls = get(method)
    return issubclass(cls, DeltaCodec) and cls.trainable is not DeltaCodec.trainable


def distill(
    job: CompressJob, plan: Plan, workspace: Workspace, resources: Resources
) -> dict[str, Any]:
    """Train the plan's pieces; what a record says of it. Raises DeltafoldError."""
    from deltafold.calibration.stream import StreamedModel, default_memory_bytes
    from deltafold.training.stored_numbers import State, split_samples, train
    from deltafold.training.watch import Watch

    asked = job.evidence.distillation
    assert asked is not None
    if len(asked.samples) < FEWEST:
        raise UsageError(
            f"--steps needs at least {FEWEST} samples, and the calibration text gives "
            f"{len(asked.samples)}; give more text."
        )
    begun = time.monotonic()
    allowance = resources.memory_bytes or default_memory_bytes()
    student = PlanStudent(job, plan, workspace, allowance // 4)
    model = StreamedModel(job.pair.finetuned, memory_bytes=allowance // 4, scratch=workspace.folder)

    def report(state: State) -> None:
        if resources.progress:
            words = f"step {state.step} of {asked.steps}"
            resources.progress(Step("distill", words, state.step, asked.steps, 0))

    saved = workspace.load_tensors(STATE) if workspace.has(STATE) else None
    watch = Watch(
        State.from_tensors(saved) if saved else None,
        save=lambda state: workspace.save_tensors(STATE, state.to_tensors()),
        report=report,
    )
    found = train(
        student,
        model,
        asked.samples,
        asked.steps,
        job.seed,
        memory_bytes=allowance,
        watch=watch,
    )
    better = found.best_kl < found.start_kl
    if better:
        _store(job, plan, student, found.best, workspace)
    return {
        "steps": asked.steps,
        "samples": len(asked.samples),
        "held_out": len(split_samples(asked.samples, job.seed)[1]),
        "values": sum(value.numel() for value in student.values.values()),
        "kl_before": found.start_kl,
        "kl_after": found.best_kl,
        "kept": "trained" if better else "start",
        "threads": torch.get_num_threads(),
        "seconds": time.monotonic() - begun,
    }


def _store(
    job: CompressJob,
    plan: Plan,
    student: PlanStudent,
    values: dict[str, torch.Tensor],
    workspace: Workspace,
) -> None:
    """Trained parts into `distilled/`; checksums and errors into the plan."""
    for tensor, piece in plan.lossy:
        if piece.stem not in student.trained:
            continue
        parts = student.trainable(tensor, piece).store(student.values_of(piece, values))
        workspace.save_tensors(f"distilled/{piece.stem}.safetensors", parts)
        piece.folder = "distilled"
        piece.checksums = {name: checksum(part) for name, part in sorted(parts.items())}
        key = job.key(tensor.pairing.name, piece.start)
        rows = tensor.delta(job, piece)
        error = relative_error(job.codec(piece.codec), parts, piece.settings, rows, key)
        piece.error = _no_longer(error, piece.error)


def _no_longer(error: float, before: float | None) -> float:
    """The error with as many of its digits as take no more room in the manifest than `before`."""
    room = len(repr(before))
    rounded = [float(f"{error:.{digits}g}") for digits in (4, 3, 2, 1)]
    return next((each for each in rounded if len(repr(each)) <= room), rounded[-1])
