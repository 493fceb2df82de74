"""What of a fine-tune cannot be a small difference, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltafold.compressing.job import CompressJob
from deltafold.compressing.methods.budget import refuse
from deltafold.compressing.pair import Pairing
from deltafold.compressing.planned import Plan
from deltafold.errors import BudgetError

NOTABLE_SHARE = 0.05  # of the bytes of a fine-tune: less is not worth a line
NAMED = 3


def refused(job: CompressJob, plan: Plan, smallest_bytes: int) -> BudgetError:
    """The error for a budget that cannot be met, with what stands in its way."""
    assert job.budget is not None
    total = job.pair.finetuned.total_bytes
    return refuse(job.budget, total, smallest_bytes, job.method, _why(plan))


def no_counterpart(plan: Plan) -> dict[str, Any]:
    """For the record: tensors that refer to nothing in the base: how many, bytes, share, largest."""
    alone = [t.pairing for t in plan.tensors if t.survey.base_digest is None and t.same_as is None]
    return _told(alone, plan)


def _told(chosen: Sequence[Pairing], plan: Plan) -> dict[str, Any]:
    n_bytes = sum(pairing.tuned.n_bytes for pairing in chosen)
    total = sum(tensor.pairing.tuned.n_bytes for tensor in plan.tensors)
    largest = sorted(chosen, key=lambda pairing: (-pairing.tuned.n_bytes, pairing.name))
    return {
        "tensors": len(chosen),
        "bytes": n_bytes,
        "share": n_bytes / total if total else 0.0,
        "largest": [pairing.name for pairing in largest[:NAMED]],
    }


def in_words(told: dict[str, Any]) -> str:
    """`12 % of the bytes (4 tensors: a, b, c and 1 more)`."""
    more = told["tensors"] - len(told["largest"])
    names = ", ".join(told["largest"]) + (f" and {more} more" if more else "")
    plural = "s" if told["tensors"] != 1 else ""
    return f"{told['share']:.0%} of the bytes ({told['tensors']} tensor{plural}: {names})"


def _why(plan: Plan) -> str:
    """The end of the sentence that refuses a budget."""
    alone = no_counterpart(plan)
    if alone["share"] >= NOTABLE_SHARE:
        return f"; {in_words(alone)} are only in the fine-tune and stored whole"
    eight = [t.pairing for t in plan.tensors if t.pairing.tuned.dtype.startswith("F8_")]
    told = _told(eight, plan)
    if told["share"] >= NOTABLE_SHARE:
        return (
            f"; {in_words(told)} are FP8, which no method approximates: compress the 16-bit "
            "checkpoint that they were made from, or store them exactly with --method lossless"
        )
    return ""
