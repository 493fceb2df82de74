"""The record of a `factor` run: what may stay, what every unit became, and what that costs."""

from __future__ import annotations

from typing import Any

from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods.units import Ranks, Unit, rank_share, total
from deltafold.factoring.store import FactorStore
from deltafold.running.record import Record


def summary(job: FactorJob, ranks: Ranks | None) -> Record:
    """What is known before any work; without ranks only what is asked for and possible.

    The share of a rank and the share of parameters are two things, and both are stated.
    """
    parameters: dict[str, Any] = {
        "total": job.total,
        "factorable": job.dense,
        "asked_share": job.request.parameters,
        "least_share": job.least_share(),
    }
    found: Record = {
        "model": job.checkpoint.label,
        "method": {"name": job.method.name, "paper": job.method.paper},
        "blocks": job.blocks,
        "parameters": parameters,
        "left_out": job.checkpoint.left_out,
    }
    if ranks is None:
        parameters["kept_at_most"] = job.total - job.dense + job.budget
        return found
    kept = total(job.units, ranks)
    parameters |= {
        "kept": job.total - job.dense + kept,
        "parameter_share": (job.total - job.dense + kept) / job.total,
        "factorable_share": kept / job.dense,
        "rank_share": rank_share(job.units, ranks),
    }
    return found | {"roles": _roles(job, ranks), "units": _units(job, ranks)}


def _roles(job: FactorJob, ranks: Ranks) -> list[Record]:
    """Counts by role, in the order in which roles come."""
    found = []
    for role in dict.fromkeys(unit.role for unit in job.units):
        pairs = [(u, r) for u, r in zip(job.units, ranks, strict=True) if u.role == role]
        units, chosen = [u for u, _ in pairs], [r for _, r in pairs]
        factored = [rank for rank in chosen if rank is not None]
        dense = sum(unit.dense for unit in units)
        found.append({
            "role": role,
            "layers": sum(len(unit.rows) for unit in units),
            "units": len(units),
            "dense_units": len(units) - len(factored),
            "blocks_together": max(len(unit.blocks) for unit in units),
            "rank": [min(factored), max(factored)] if factored else None,
            "rank_share": rank_share(units, chosen),
            "parameters": dense,
            "kept": total(units, chosen),
            "parameter_share": total(units, chosen) / dense,
        })  # fmt: skip
    return found


def _units(job: FactorJob, ranks: Ranks) -> list[Record]:
    return [
        {
            "name": unit.name,
            "role": unit.role,
            "blocks": list(unit.blocks),
            "rank": rank,
            "rank_share": _share_of_rank(unit, rank),
            "parameter_share": unit.parameters(rank) / unit.dense,
        }
        for unit, rank in zip(job.units, ranks, strict=True)
    ]


def _share_of_rank(unit: Unit, rank: int | None) -> float:
    return 1.0 if rank is None else rank / unit.full


def outcome(job: FactorJob, ranks: Ranks, store: FactorStore) -> Record:
    """What factors lose of outputs (of weights, by methods that see no inputs), by unit and role."""
    units = _units(job, ranks)
    lost: dict[str, list[float]] = {}
    for number, (row, rank) in enumerate(zip(units, ranks, strict=True)):
        if rank is None:
            row["relative_error"] = 0.0
            continue
        figures = store.figures(number)
        sums = sum(figures["lost"].values()), sum(figures["whole"].values())
        row["relative_error"] = sums[0] / sums[1] if sums[1] else 0.0
        lost.setdefault(row["role"], []).append(row["relative_error"])
    roles = _roles(job, ranks)
    for role in roles:
        found = lost.get(role["role"], [])
        role["relative_error"] = sum(found) / len(found) if found else 0.0
    return {
        "units": units,
        "roles": roles,
        "error_of": "outputs" if job.method.whitened else "weights",
    }
