"""From weights to a plan with settings: survey, decide, factor, allot."""

from __future__ import annotations

import math
from functools import partial

from deltafold.codecs.base import Settings
from deltafold.compressing.job import CompressJob
from deltafold.compressing.methods.budget import Budget, allot, share_within
from deltafold.compressing.pair import Pairing
from deltafold.compressing.planned import Plan, PlannedPiece, PlannedTensor, decide, exact_pieces
from deltafold.compressing.shortfall import refused
from deltafold.compressing.sizing import (
    archive_bytes,
    fixed_bytes,
    smallest_bytes,
    smallest_settings,
    units,
)
from deltafold.compressing.survey import CHUNK_BYTES, SPARSE_SHARE, TensorSurvey, survey_tensor
from deltafold.compressing.triplets import factor_all
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace


def schedule(job: CompressJob, workspace: Workspace, resources: Resources) -> Plan:
    """Survey, decide, factor, allot. Raises BudgetError, NonFiniteError.

    Pieces of a variable codec are left without settings: see `search.py`.
    """
    surveys = _survey_all(job, workspace, resources)
    plan = decide(job, surveys)
    if job.budget is None or not plan.lossy:
        _check_exact(job, plan)
        return plan
    share = _prefer_exact(job, plan, job.budget)
    if not plan.lossy:
        _check_exact(job, plan)
    if not plan.lossy or job.codec(job.method).variable:
        return plan
    factor_all(job, plan, share, workspace, resources)
    _allot(job, plan, share)
    return plan


def _survey_all(job: CompressJob, workspace: Workspace, resources: Resources) -> list[TensorSurvey]:
    pair = job.pair

    def survey(index: int, pairing: Pairing) -> int:
        found = survey_tensor(pair, pairing, index, workspace, job.exact_method)
        files = [piece["file"] for span in found.spans for piece in span.exact]
        workspace.save_json(f"survey/{index:06d}.json", found.to_json(), of=files)
        return sum(span.exact_bytes for span in found.spans)

    tasks = [
        Task(
            pairing.name,
            partial(survey, index, pairing),
            memory_bytes=8 * min(CHUNK_BYTES, pairing.tuned.n_bytes) + (1 << 20),
            work=pairing.tuned.n_bytes,
        )
        for index, pairing in enumerate(pair.pairings)
        if not workspace.has(f"survey/{index:06d}.json")
    ]
    resources.run("survey", tasks)
    return [
        TensorSurvey.from_json(workspace.load_json(f"survey/{index:06d}.json"))
        for index in range(len(pair.pairings))
    ]


def _prefer_exact(job: CompressJob, plan: Plan, budget: Budget) -> float:
    """Turn lossy pieces exact where that costs no more than their share; returns the share.

    Cheapest first; each one that turns exact below its share leaves more for the others. A piece
    with few changed values that stays lossy is not low-rank, and is not treated as if it were.
    """
    checkpoint_bytes = job.pair.finetuned.total_bytes
    target = budget.target_bytes(checkpoint_bytes)

    def share_now() -> float:
        if target is None:
            return 1.0 / budget.asked
        return share_within(units(job, plan), target - fixed_bytes(job, plan))

    candidates = sorted(
        (
            (tensor.span(piece).exact_bytes / _raw_bytes(tensor, piece), tensor, piece)
            for tensor, piece in (plan.lossy if job.fallback else [])
            if tensor.span(piece).exact
        ),
        key=lambda item: (item[0], item[1].pairing.name, item[2].start),
    )
    share = share_now()
    for cost, tensor, piece in candidates:
        if cost <= share:
            at = tensor.pieces.index(piece)
            tensor.pieces[at : at + 1] = exact_pieces(
                tensor.span(piece), "few values changed: exact costs less"
            )
            share = share_now()
        else:
            changed = tensor.span(piece).changed_values
            if (
                changed <= SPARSE_SHARE * _raw_bytes(tensor, piece) / 2
                and job.codec(piece.codec).uses_factors
            ):
                piece.codec, piece.why = "magnitude", "90 % of values equal: not low-rank"
    if plan.lossy and share <= 0:
        assert target is not None
        if (smallest := smallest_bytes(job, plan, units(job, plan))) > 1.01 * target:
            raise refused(job, plan, smallest)
    return share


def _check_exact(job: CompressJob, plan: Plan) -> None:
    """A plan in which nothing is approximated takes what it takes. Raises BudgetError."""
    target = job.budget.target_bytes(job.pair.finetuned.total_bytes) if job.budget else None
    if target is not None and (needed := archive_bytes(job, plan)) > 1.01 * target:
        raise refused(job, plan, needed)


def _raw_bytes(tensor: PlannedTensor, piece: PlannedPiece) -> int:
    o, i = tensor.shape(piece)
    return 2 * o * i


def _allot(job: CompressJob, plan: Plan, share: float) -> None:
    """Settings for every lossy piece, so that the archive meets the budget.

    The manifest's length depends on the settings and the settings on what the manifest leaves, and
    ranks are whole numbers: the share is narrowed down, and the fullest allotment that fits is taken.
    """
    assert job.budget is not None
    matrices = units(job, plan)
    nominal = job.budget.kind == "nominal_ratio"
    target = job.budget.target_bytes(job.pair.finetuned.total_bytes)
    if target is None:
        _settle(plan, allot(matrices, share, nominal)[0])
        return
    raw_bytes = sum(unit.raw_bytes for unit in matrices)
    fits: tuple[int, list[Settings]] | None = None
    low, high, share = 0.0, math.inf, max(share, 1e-4)
    while share > 1e-7 and high - low > 1e-3 * low:
        settings, _ = allot(matrices, share, nominal)
        _settle(plan, settings)
        missing = target - (needed := archive_bytes(job, plan))
        if missing < 0:
            high = share
        else:
            low = share
            if fits is None or needed > fits[0]:
                fits = needed, settings
            if missing < 0.001 * target or share >= 1.0:
                break
        share += missing / raw_bytes
        if not low < share < high:
            share = (low + high) / 2
    _settle(plan, fits[1] if fits else smallest_settings(matrices))
    if not fits and (smallest := archive_bytes(job, plan)) > 1.01 * target:
        raise refused(job, plan, smallest)


def _settle(plan: Plan, settings: list[Settings]) -> None:
    for (_, piece), chosen in zip(plan.lossy, settings, strict=True):
        piece.settings = chosen
