"""The record of a `share` run: its plan, and the curves that figures are drawn from."""

from __future__ import annotations

from deltafold.running.record import Record
from deltafold.sharing.methods.plan import Plan
from deltafold.sharing.search import Numbers
from deltafold.training import State

CURVE_POINTS = 200


def plan_record(plan: Plan) -> Record:
    """The plan as records hold it."""
    return {"kind": "share-plan", "model": plan.structure.label, **plan.to_json()}


def training_record(state: State, plan: Plan, numbers: Numbers, processes: int) -> Record:
    """How training went, in so many processes."""
    steps, modules = numbers.request.steps, list(plan.groups)
    return {
        "steps_done": state.step,
        "best_step": state.best_step,
        "rate_scale": state.scale,
        "tokens_per_second_training": state.tokens_per_second * processes,
        "trained_parameters": sum(value.numel() for value in state.best.values()),
        "curve": _curve(state),
        "exams": [{"step": int(s), "ce": ce, "kl": kl} for s, ce, kl in state.exams],
        "replacement": {
            "modules": modules,
            "steps": steps,
            "points": numbers.schedule.table(len(modules), steps),
        },
    }


def _curve(state: State) -> list[Record]:
    """Losses by step; of a long run every so many steps' means."""
    each = max(1, len(state.curve) // CURVE_POINTS)
    curve = []
    for first in range(0, len(state.curve), each):
        rows = state.curve[first : first + each]
        means = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
        curve.append({"step": int(rows[-1][0]), "loss": means[1], "ce": means[2], "kl": means[3]})
    return curve
