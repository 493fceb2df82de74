"""Put finished pieces together: payload in canonical order, side files, manifest last.

What was approximated is decoded once more, out of the archive as it lies there, by what will restore
it: the manifest says what came out, so that a decoder that gives other bits is found.
"""

from __future__ import annotations

from functools import partial

from deltafold.archive import Archive, Tensor, TensorDigest
from deltafold.archive.manifest import Manifest
from deltafold.archive.writer import write_manifest, write_payload, write_side_files
from deltafold.checkpoint import tensor_bytes
from deltafold.compressing.job import CompressJob
from deltafold.compressing.planned import Plan
from deltafold.compressing.sizing import draft_manifest, part_specs
from deltafold.errors import StorageError
from deltafold.lazy import torch
from deltafold.restoring.decode import decoded_rows
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace, checksum

TASK_MEMORY_BYTES = 200 << 20
_RESTORED = "restored/{:06d}.json"


def assemble(job: CompressJob, plan: Plan, workspace: Workspace, resources: Resources) -> Manifest:
    """Write the archive into the workspace's sub-folder `archive`."""
    folder = workspace.new_folder("archive")
    draft = draft_manifest(job, plan)
    # part's name in the payload -> (file, name in it, checksum)
    where: dict[str, tuple[str, str, str]] = {}
    for planned, tensor in zip(plan.tensors, draft.tensors, strict=True):
        for ours, piece in zip(planned.pieces, tensor.pieces, strict=True):
            file = ours.exact["file"] if ours.exact else f"{ours.folder}/{ours.stem}.safetensors"
            for part, noted in sorted(piece.parts.items()):
                where[tensor.part_name(piece, part)] = (file, part, noted)
    payload = write_payload(
        folder, part_specs(job, plan, draft), lambda name: _part(workspace, *where[name])
    )
    write_side_files(folder, job.side_files[1])
    write_manifest(folder, draft.model_copy(update={"payload": payload}))
    _restored(job, plan, workspace, resources)
    manifest = draft_manifest(job, plan).model_copy(update={"payload": payload})
    write_manifest(folder, manifest)
    return manifest


def _part(workspace: Workspace, file: str, part: str, noted: str) -> torch.Tensor:
    """A part as it was when it was encoded. Raises StorageError if it is another one now."""
    found = workspace.load_tensor(file, part)
    if checksum(found) != noted:
        workspace.drop(file)
        raise StorageError(
            f"{workspace.folder / file} is not what was written there a while ago; run the same "
            "command again, and it is made anew, and look after the disk."
        )
    return found


def _restored(job: CompressJob, plan: Plan, workspace: Workspace, resources: Resources) -> None:
    """Decode every approximated tensor of the archive in the workspace; fills in its checksum."""
    base = job.pair.base
    with Archive(workspace.folder / "archive") as archive:

        def decode(number: int, tensor: Tensor) -> None:
            digest = TensorDigest(tensor.dtype, tensor.shape)
            for _, rows in decoded_rows(archive, tensor, base):
                digest.update(tensor_bytes(rows))
            found = {"archive": archive.identity, "restored": digest.checksum()}
            workspace.save_json(_RESTORED.format(number), found)

        def known(number: int) -> bool:
            """Whether an interrupted run has decoded it, out of the very same archive."""
            file = _RESTORED.format(number)
            return workspace.has(file) and workspace.load_json(file)["archive"] == archive.identity

        lossy = [n for n, planned in enumerate(plan.tensors) if planned.lossy]
        resources.run(
            "check",
            [
                Task(
                    archive.manifest.tensors[n].name,
                    partial(decode, n, archive.manifest.tensors[n]),
                    memory_bytes=TASK_MEMORY_BYTES,
                    work=float(plan.tensors[n].pairing.tuned.elements),
                )
                for n in lossy
                if not known(n)
            ],
        )
    for n in lossy:
        plan.tensors[n].restored = workspace.load_json(_RESTORED.format(n))["restored"]
