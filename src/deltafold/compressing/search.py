"""The step of entropy-coded pieces: one number for the whole model, found by true bytes.

Pilots say how many bytes each piece takes at some steps, from a sample of its rows. Bisection on
their sum gives the step; encoding gives the true bytes; where those miss the target, the pilots are
corrected by what they were wrong by, and the pieces are encoded again.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from deltafold.codecs.base import Settings, VariableCodec
from deltafold.coding.correction import fix_bytes
from deltafold.compressing.encode import encode_lossy, task_memory_bytes
from deltafold.compressing.job import CompressJob
from deltafold.compressing.planned import Plan, PlannedPiece, PlannedTensor
from deltafold.compressing.shortfall import refused
from deltafold.compressing.sizing import archive_bytes
from deltafold.names import is_vocabulary
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace

STEPS = [float(f"{step:.4g}") for step in np.geomspace(0.4, 1600, 13)]
RANKS = (8, 4, 2, 1)
CORRECTION_SHARE = (
    0.04  # of the bytes of all pieces: what it costs more, training does not win back
)
# What each round aims at, and what it is content with, as shares of the bytes allowed. Later rounds
# ask for less: where weights are coarse against the delta, bytes jump with the step.
ROUNDS = ((0.997, 0.99), (0.996, 0.99), (0.995, 0.99), (0.99, 0.97), (0.97, 0.9), (0.9, 0.0))


def encode_to_size(
    job: CompressJob, plan: Plan, workspace: Workspace, resources: Resources
) -> None:
    """Encode a plan of variable pieces so that the archive meets the budget. Raises BudgetError."""
    assert job.budget is not None
    job.fisher_scale = _fisher_scale(job, plan)
    pilots = _pilot_all(job, plan, workspace, resources)
    checkpoint_bytes = job.pair.finetuned.total_bytes
    target = job.budget.target_bytes(checkpoint_bytes)
    for _, piece in plan.lossy:
        piece.settings = {"step": 0.0, "n_bytes": 0}
    corrections = _corrections(job, plan, _room(job, plan, target))
    wrong_by = 1.0
    for aim, close in ROUNDS:
        for _, piece in plan.lossy:
            piece.settings |= corrections[piece.stem]
        room = _room(job, plan, target)
        if room <= 0:
            raise refused(job, plan, int(-room + (target or 0)) + 1)
        step = _step_for(pilots, room * aim / wrong_by)
        estimates = [float(_at(pilot, step)) for pilot in pilots]
        for (_, piece), estimate in zip(plan.lossy, estimates, strict=True):
            piece.settings = {"step": step, "n_bytes": int(estimate)} | corrections[piece.stem]
            piece.checksums = {}
        encode_lossy(job, plan, workspace, resources)
        used, room = _counted_bytes(job, plan), _room(job, plan, target)  # true errors' digits
        if close * room <= used <= room or (used < room and step <= STEPS[0]):
            return
        wrong_by = used / max(1.0, _counted_sum(job, plan, estimates))
    if used > room:
        raise refused(job, plan, archive_bytes(job, plan))


def _fisher_scale(job: CompressJob, plan: Plan) -> float:
    """What brings the information to 1 / sigma^2 in the geometric mean over all values.

    Then the step means the same whatever the model: codecs take the root mean square of a matrix
    times the root of its mean information as a number near 1.
    """
    total = values = 0.0
    for tensor, piece in plan.lossy:
        o, i = tensor.shape(piece)
        found = job.fisher(tensor.pairing.name, piece.start, piece.stop)
        sigma_squared = tensor.span(piece).delta_squared / (o * i)
        if found is not None and found.mean * sigma_squared > 0:
            total += o * i * math.log(found.mean * sigma_squared)
            values += o * i
    return math.exp(-total / values) if values else 1.0


def _pilot_all(
    job: CompressJob, plan: Plan, workspace: Workspace, resources: Resources
) -> list[list[float]]:
    """Bytes of each piece at each of `STEPS`."""

    def pilot(tensor: PlannedTensor, piece: PlannedPiece) -> None:
        codec = job.codec(piece.codec)
        assert isinstance(codec, VariableCodec)
        name = tensor.pairing.name
        found = codec.pilot(tensor.delta(job, piece), STEPS, job.key(name, piece.start))
        workspace.save_json(f"pilot/{piece.stem}.json", found)

    tasks = [
        Task(
            tensor.pairing.name,
            partial(pilot, tensor, piece),
            task_memory_bytes(tensor, piece),
            float(piece.stop - piece.start),
        )
        for tensor, piece in plan.lossy
        if not workspace.has(f"pilot/{piece.stem}.json")
    ]
    resources.run("pilot", tasks)
    return [workspace.load_json(f"pilot/{piece.stem}.json") for _, piece in plan.lossy]


def _at(pilot: list[float], step: float) -> float:
    """Bytes of a piece at a step, between those that were tried."""
    return float(np.exp(np.interp(np.log(step), np.log(STEPS), np.log(np.maximum(pilot, 1.0)))))


def _step_for(pilots: list[list[float]], n_bytes: float) -> float:
    """The smallest step, six digits, at which all pieces together take at most `n_bytes`."""
    low, high = np.log(STEPS[0]), np.log(STEPS[-1])
    for _ in range(40):
        middle = (low + high) / 2
        fits = sum(_at(pilot, float(np.exp(middle))) for pilot in pilots) <= n_bytes
        low, high = (low, middle) if fits else (middle, high)
    return float(f"{np.exp(high):.6g}")


def _room(job: CompressJob, plan: Plan, target: float | None) -> float:
    """Bytes that the pieces may take: what the rest of the archive leaves, or the nominal share."""
    assert job.budget is not None
    if target is not None:
        return target - (archive_bytes(job, plan) - sum(_bytes(p) for _, p in plan.lossy))
    raw = sum(2 * (p.stop - p.start) * t.pairing.tuned.matrix_shape[1] for t, p in plan.lossy)
    return raw / job.budget.asked - _counted_sum(job, plan, _fix_bytes(plan))


def _corrections(job: CompressJob, plan: Plan, room: float) -> dict[str, Settings]:
    """For each piece the rank of a correction to be trained: the largest that is cheap enough."""
    none: dict[str, Settings] = {piece.stem: {} for _, piece in plan.lossy}
    if job.evidence.distillation is None:
        return none
    for rank in RANKS:
        chosen = {
            piece.stem: {} if is_vocabulary(tensor.pairing.name) else {"rank": rank}
            for tensor, piece in plan.lossy
        }
        cost = sum(
            fix_bytes(tensor.shape(piece), chosen[piece.stem].get("rank", 0))
            for tensor, piece in plan.lossy
        )
        if cost <= CORRECTION_SHARE * room:
            return chosen
    return none


def _fix_bytes(plan: Plan) -> list[float]:
    """Bytes of each piece's correction."""
    return [
        float(fix_bytes(tensor.shape(piece), int(piece.settings.get("rank", 0))))
        for tensor, piece in plan.lossy
    ]


def _counted_bytes(job: CompressJob, plan: Plan) -> float:
    return _counted_sum(job, plan, [float(_bytes(piece)) for _, piece in plan.lossy])


def _counted_sum(job: CompressJob, plan: Plan, n_bytes: list[float]) -> float:
    """Bytes of all pieces; by the papers' count, of linear layers alone, scaled to all values."""
    assert job.budget is not None
    if job.budget.kind != "nominal_ratio":
        return sum(n_bytes)
    linear, values, every = 0.0, 0, 0
    for (tensor, piece), size in zip(plan.lossy, n_bytes, strict=True):
        count = (piece.stop - piece.start) * tensor.pairing.tuned.matrix_shape[1]
        every += count
        if not is_vocabulary(tensor.pairing.name):
            linear, values = linear + size, values + count
    return linear * every / values if values else sum(n_bytes)


def _bytes(piece: PlannedPiece) -> int:
    return int(piece.settings.get("n_bytes", 0))
