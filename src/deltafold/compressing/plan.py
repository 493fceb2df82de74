"""`plan`: what `compress` would do, from headers alone, in milliseconds."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from deltafold.archive.writer import encode_side_files
from deltafold.codecs import delta_codec, get
from deltafold.compressing.adapter import whole_model
from deltafold.compressing.job import CompressJob, budget_of
from deltafold.compressing.methods.budget import Budget, Unit, allot, share_within
from deltafold.compressing.order import looks_swapped
from deltafold.compressing.pair import Pair, open_pair
from deltafold.compressing.request import CompressRequest, PlanRequest
from deltafold.compressing.triplets import factor_memory_bytes
from deltafold.names import role_of
from deltafold.running.engine import default_memory_bytes, default_workers
from deltafold.running.front import front

MANIFEST_BYTES_A_TENSOR = 420  # name, shape, digests, settings, checksums, payload headers
_EXACT_SHARE = 0.6  # what exact storage of a changed tensor costs, of its raw bytes


def planned(request: Any) -> dict[str, Any]:
    """What `compress` would do with a request, a `PlanRequest` or its own; reads headers only.

    Settings given as `auto` are planned at their defaults: sizes hardly differ.
    """
    method = request.method
    budget = budget_of(method, *request.budget)
    known = {k: v for k, v in request.method_settings.items() if k not in request.open_settings}
    config = get(method).Config.from_options(method, known)
    with (
        whole_model(request.base, request.finetuned) as finetuned,
        open_pair(request.base, finetuned) as pair,
    ):
        asked = CompressRequest(request.base, request.finetuned, "", method)
        job = CompressJob(pair, asked, config, budget)
        return {
            "base": pair.base.label,
            "finetuned": pair.finetuned.label,
            "method": method,
            "budget": {"kind": budget.kind, "asked": budget.asked} if budget else {},
            "checkpoint_bytes": pair.finetuned.total_bytes,
            "roles": _roles(pair, budget is not None),
            "looks_swapped": looks_swapped(pair),
            "names": pair.alignment.rules,
            **_sides(pair),
            **(expected := _expected(job, pair, budget, config.to_json())),
            "memory_bytes": _memory_bytes(_largest_task_bytes(job, pair, expected["share"])),
            "disk_bytes": job.disk_needed_bytes,
        }


plan = front("plan", PlanRequest, planned)


def _roles(pair: Pair, lossy: bool) -> list[dict[str, Any]]:
    table: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"tensors": 0, "elements": 0, "n_bytes": 0, "approximated": 0}
    )
    for pairing in pair.pairings:
        row = table[role_of(pairing.name)]
        row["tensors"] += 1
        row["elements"] += pairing.tuned.elements
        row["n_bytes"] += pairing.tuned.n_bytes
        row["approximated"] += lossy and any(map(pairing.lossy_allowed, pairing.spans))
    return [{"role": role, **row} for role, row in sorted(table.items())]


def _sides(pair: Pair) -> dict[str, Any]:
    grown = [
        {"name": p.name, "base_rows": p.base.shape[0], "rows": p.tuned.shape[0]}
        for p in pair.pairings
        if p.base is not None and p.base.matrix_shape != p.tuned.matrix_shape
    ]
    config = pair.finetuned.config()
    return {
        "only_in_finetuned": [p.name for p in pair.pairings if p.base is None],
        "only_in_base": pair.removed,
        "vocabulary_changed": grown,
        "dtype_changed": [
            p.name for p in pair.pairings if p.base is not None and p.base.dtype != p.tuned.dtype
        ],
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }


def _expected(
    job: CompressJob, pair: Pair, budget: Budget | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Expected bytes of the archive, and the share of values that lossy matrices get."""
    _, frames = encode_side_files(pair.finetuned, pair.base)
    fixed = sum(map(len, frames.values())) + 2000 + MANIFEST_BYTES_A_TENSOR * len(pair.pairings)
    units: list[Unit] = []
    codec = delta_codec(job.method, options) if budget else None
    for pairing in pair.pairings:
        columns = pairing.tuned.matrix_shape[1]
        for span in pairing.spans:
            if codec is not None and pairing.lossy_allowed(span):
                units.append(Unit(pairing.name, (span.rows, columns), codec))
            else:
                fixed += int(_EXACT_SHARE * span.rows * columns * pairing.tuned.itemsize)
    total = pair.finetuned.total_bytes
    target = budget.target_bytes(total) if budget else None
    if budget is None:
        return {"expected_bytes": fixed, "share": None, "feasible": True}
    share = 1 / budget.asked if target is None else share_within(units, target - fixed)
    settings, _ = allot(units, share, nominal=target is None)
    spent = sum(
        unit.codec.part_bytes(unit.shape, chosen)
        for unit, chosen in zip(units, settings, strict=True)
    )
    return {"expected_bytes": fixed + spent, "share": share, "feasible": share > 0 or not units}


def _memory_bytes(largest_task_bytes: int) -> int:
    """What tasks hold together: as many as fit the allowance, or the largest alone."""
    together = min(default_memory_bytes(), default_workers() * largest_task_bytes)
    return max(largest_task_bytes, together)


def _largest_task_bytes(job: CompressJob, pair: Pair, share: float | None) -> int:
    """Peak memory of the largest task."""
    sizes = [128 << 20]
    codec = job.codec(job.method) if share is not None else None
    if codec is not None and share is not None and codec.uses_factors:
        for pairing in pair.pairings:
            columns = pairing.tuned.matrix_shape[1]
            for span in pairing.spans:
                if pairing.lossy_allowed(span):
                    sizes.append(factor_memory_bytes(codec, (span.rows, columns), share))
    return max(sizes)
