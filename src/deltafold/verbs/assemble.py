"""Put finished pieces together: payload in canonical order, side files, manifest last."""

from __future__ import annotations

import shutil

import torch

from deltafold.archive.manifest import Manifest
from deltafold.archive.writer import write_manifest, write_payload, write_side_files
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.writer import TensorSpec
from deltafold.verbs.job import Job
from deltafold.verbs.planned import Plan
from deltafold.verbs.sizing import draft_manifest
from deltafold.verbs.workspace import Workspace


def assemble(job: Job, plan: Plan, workspace: Workspace) -> Manifest:
    """Write the archive into the workspace's sub-folder `archive`."""
    folder = workspace.folder / "archive"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    draft = draft_manifest(job, plan)
    where: dict[str, tuple[str, str]] = {}  # part's name in the payload -> (file, name in it)
    for planned, tensor in zip(plan.tensors, draft.tensors, strict=True):
        for ours, piece in zip(planned.pieces, tensor.pieces, strict=True):
            file = ours.exact["file"] if ours.exact else f"lossy/{ours.stem}.safetensors"
            for part in sorted(piece.parts):
                where[tensor.part_name(piece, part)] = (file, part)
    specs = _stored_specs(workspace, where)

    def load(name: str) -> torch.Tensor:
        file, part = where[name]
        with Checkpoint(workspace.folder / file) as found:
            return found.tensor(part)

    payload = write_payload(folder, specs, load)
    write_side_files(folder, job.side_files[1])
    manifest = draft.model_copy(update={"payload": payload})
    write_manifest(folder, manifest)
    return manifest


def _stored_specs(workspace: Workspace, where: dict[str, tuple[str, str]]) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    for name, (file, part) in where.items():
        with Checkpoint(workspace.folder / file) as found:
            info = found.tensors[part]
        specs.append((name, info.dtype, info.shape))
    return specs
