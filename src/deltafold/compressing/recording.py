"""The record of a `compress` run: every tensor, its codec, bytes, error; totals; time; memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from deltafold.archive import Archive, Tensor
from deltafold.compressing.job import CompressJob
from deltafold.compressing.planned import Plan, PlannedTensor
from deltafold.compressing.shortfall import no_counterpart
from deltafold.names import block_of, role_of
from deltafold.restoring.totals import archive_totals, codec_names, tensor_bytes
from deltafold.running.record import Record

SPECTRUM_POINTS = 64


def compress_record(job: CompressJob, plan: Plan, archive: Archive, output: Path) -> Record:
    """Everything that the run did and measured."""
    totals = archive_totals(archive)
    asked = job.budget.asked if job.budget else None
    kind = job.budget.kind if job.budget else "none"
    got = {"bytes": totals["archive_bytes"]} | totals
    return {
        "base": job.pair.base.label,
        "finetuned": job.pair.finetuned.label,
        "archive": str(output),
        "method": job.method,
        "settings": {
            **job.request.settings(),
            **job.config.to_json(),
            "workers": job.request.workers,
        },
        "budget": {"kind": kind, "asked": asked, "got": got.get(kind)},
        "totals": totals,
        "left_out": job.pair.finetuned.left_out,
        "pairing": {"rules": job.pair.alignment.rules, "only_in_finetuned": no_counterpart(plan)},
        "tensors": [
            _tensor_row(planned, archive.by_name[planned.pairing.name], archive)
            for planned in plan.tensors
        ],
    }


def _tensor_row(planned: PlannedTensor, tensor: Tensor, archive: Archive) -> dict[str, Any]:
    info, survey = planned.pairing.tuned, planned.survey
    delta_squared = sum(span.delta_squared for span in survey.spans)
    wrong = sum((p.error or 0.0) ** 2 * p.delta_squared for p in planned.pieces)
    lossy = [piece for piece in planned.pieces if piece.error is not None]
    spectrum = next((p.spectrum for p in lossy if p.spectrum is not None), None)
    why = [piece.why for piece in planned.pieces if piece.why]
    return {
        "name": info.name,
        "role": role_of(info.name),
        "block": block_of(info.name),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "elements": info.elements,
        "codec": codec_names(tensor),
        "bytes": tensor_bytes(tensor, archive),
        "why": f"same values as {planned.same_as}"
        if planned.same_as
        else "; ".join(dict.fromkeys(why)) or None,
        "relative_error": math.sqrt(wrong / delta_squared) if lossy and delta_squared else None,
        "delta_norm": math.sqrt(delta_squared),
        "base_norm": math.sqrt(sum(span.base_squared for span in survey.spans)),
        "changed_share": sum(s.changed_values for s in survey.spans) / max(1, info.elements),
        "spectrum": _thinned(spectrum) if spectrum is not None else None,
    }


def _thinned(spectrum: Any) -> list[dict[str, float]]:
    count = len(spectrum)
    step = max(1, count / SPECTRUM_POINTS)
    chosen = sorted({int(k * step) for k in range(SPECTRUM_POINTS) if int(k * step) < count})
    return [{"index": k, "value": float(f"{spectrum[k]:.5g}")} for k in chosen]
