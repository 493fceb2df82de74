"""Put finished pieces together: payload in canonical order, side files, manifest last."""

from __future__ import annotations

import shutil

from deltafold.archive.manifest import Manifest
from deltafold.archive.writer import write_manifest, write_payload, write_side_files
from deltafold.compressing.job import CompressJob
from deltafold.compressing.planned import Plan
from deltafold.compressing.sizing import draft_manifest, part_specs
from deltafold.running.workspace import Workspace


def assemble(job: CompressJob, plan: Plan, workspace: Workspace) -> Manifest:
    """Write the archive into the workspace's sub-folder `archive`."""
    folder = workspace.folder / "archive"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    draft = draft_manifest(job, plan)
    where: dict[str, tuple[str, str]] = {}  # part's name in the payload -> (file, name in it)
    for planned, tensor in zip(plan.tensors, draft.tensors, strict=True):
        for ours, piece in zip(planned.pieces, tensor.pieces, strict=True):
            file = ours.exact["file"] if ours.exact else f"{ours.folder}/{ours.stem}.safetensors"
            for part in sorted(piece.parts):
                where[tensor.part_name(piece, part)] = (file, part)
    payload = write_payload(
        folder, part_specs(job, plan, draft), lambda name: workspace.load_tensor(*where[name])
    )
    write_side_files(folder, job.side_files[1])
    manifest = draft.model_copy(update={"payload": payload})
    write_manifest(folder, manifest)
    return manifest
