"""The record of a `fold` run: what was asked for, what went, and why."""

from __future__ import annotations

from deltafold.checkpoint import Checkpoint
from deltafold.folding.job import FoldJob
from deltafold.folding.work import Folded
from deltafold.running.record import Record


def summary(job: FoldJob, checkpoint: Checkpoint) -> Record:
    """What is known before any work."""
    layout = job.layout
    return {
        "model": checkpoint.label,
        "method": job.method.to_json(),
        "blocks": layout.depth,
        "block_parameters": layout.parameters,
        "parameters": layout.total,
        "asked": {
            "blocks": None if job.goal else job.count,
            "layer_share": None if job.goal else job.count / layout.depth,
            "parameter_share": job.share_removed,
        },
        "left_out": checkpoint.left_out,
    }


def outcome(job: FoldJob, folded: Folded) -> Record:
    """What went: by blocks, and by parameters. Silenced sub-layers are still stored, as zeros."""
    layout, draft = job.layout, folded.draft
    gone = [number for number in range(layout.depth) if number not in draft.numbers]
    idle = sum(layout.part_parameters(part) for _, part in folded.silenced)
    return {
        "removed": {
            "blocks": gone,
            "layer_share": len(gone) / layout.depth,
            "parameters": len(gone) * layout.parameters,
            "parameter_share": len(gone) * layout.parameters / layout.total,
        },
        "silenced": [{"block": number, "part": part} for number, part in folded.silenced],
        "silenced_parameter_share": idle / layout.total,
        "kept": draft.numbers,
        "parts": [{"block": block.number, "parts": list(block.parts)} for block in draft.blocks],
        "steps": folded.steps,
        "patches": folded.patches,
        "similarity": _first_matrix(job, folded),
        **folded.notes,
    }


def _first_matrix(job: FoldJob, folded: Folded) -> Record | None:
    """The similarity matrix over the model's states, before any step."""
    if not folded.matrices:
        return None
    rows = folded.matrices[0][1].tolist()
    return {
        "name": job.method.preset.similarity,
        "values": [[float(f"{value:.6g}") for value in row] for row in rows],
    }
