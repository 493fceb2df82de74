"""`restore`: base and archive become an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from deltafold.archive import Archive, Tensor, TensorDigest
from deltafold.archive.manifest import Manifest
from deltafold.calibration.opens import open_bare
from deltafold.checkpoint import CheckpointWriter, open_checkpoint, plan_shards
from deltafold.checkpoint.contents import stem_of
from deltafold.checkpoint.writer import TensorSpec, put_file
from deltafold.dtypes import stored_bytes
from deltafold.restoring.decode import check_codecs, checked_rows, named_tensors
from deltafold.restoring.ground import fitted_base
from deltafold.restoring.request import RestoreRequest
from deltafold.restoring.totals import archive_totals
from deltafold.running.engine import Task
from deltafold.running.front import front
from deltafold.running.record import Record
from deltafold.running.run import Run
from deltafold.running.workspace import is_written

TASK_MEMORY_BYTES = 200 << 20
FOLDER = "restored"
Layout = dict[str, list[TensorSpec]]


def run_restore(request: RestoreRequest) -> Record:
    """Restore what a request asks for; see `RestoreRequest`."""
    with Run("restore", request, [request.archive, request.base]) as run:
        opened = run.entered(Archive(Path(request.archive)))
        base = run.opened(open_checkpoint(request.base))
        check_codecs(opened)
        ground = fitted_base(opened, base)
        wanted = named_tensors(opened.manifest, request.tensors)
        layout = _layout(opened.manifest, wanted, request)
        content = _content(opened, base.label, wanted) | {"output": str(run.output)}
        if request.dry_run:
            return {"kind": "restore-plan"} | content
        identity = {
            "command": "restore",
            "archive": opened.identity,
            "base": base.fingerprint(),
            "layout": {file: [spec[0] for spec in specs] for file, specs in layout.items()},
        }
        run.begin(identity, sum(map(_tensor_size, wanted)))
        workspace = run.workspace  # what tasks take along; the run itself stays here
        folder = workspace.kept_folder(FOLDER)
        writer = CheckpointWriter(
            folder, layout, opened.manifest.finetuned.metadata or {"format": "pt"}
        )
        done = {t.name: f"done/{n:06d}.json" for n, t in enumerate(opened.manifest.tensors)}

        def one(tensor: Tensor) -> None:
            columns = tensor.matrix_shape[1]
            for start, rows in checked_rows(opened, tensor, ground):
                writer.write(tensor.name, rows, start * columns)
            workspace.save_json(done[tensor.name], True)

        tasks = [
            Task(t.name, partial(one, t), TASK_MEMORY_BYTES, float(_tensor_size(t)))
            for t in wanted
            if not (workspace.has(done[t.name]) and _is_restored(opened, t, writer))
        ]
        try:
            run.resources.run("restore", tasks)
            writer.finish()
        finally:
            writer.close()
        for entry in opened.manifest.files if request.tensors is None else ():
            put_file(folder, entry.name, opened.side_file(entry, base))
        if request.tensors is None:  # the fine-tune as it was: what does not open is said, no more
            content["checked"] = open_bare(folder).to_record()
        run.publish(FOLDER)
        return run.record(content)


restore = front("restore", RestoreRequest, run_restore)


def _is_restored(archive: Archive, tensor: Tensor, writer: CheckpointWriter) -> bool:
    """Whether what an earlier run has written of a tensor is what the archive says."""
    source = archive.by_name[tensor.same_as] if tensor.same_as else tensor
    noted = source.restored if source.lossy else tensor.tuned
    if noted is None:  # format version 1 does not say it
        return False
    return is_written(writer, tensor.name, TensorDigest(tensor.dtype, tensor.shape), noted)


def _tensor_size(tensor: Tensor) -> int:
    return stored_bytes(tensor.dtype, tensor.shape)


def _spec(tensor: Tensor) -> TensorSpec:
    return (tensor.name, tensor.dtype, tensor.shape)


def _layout(manifest: Manifest, wanted: list[Tensor], request: RestoreRequest) -> Layout:
    if request.tensors is not None:
        return {"model.safetensors": [_spec(tensor) for tensor in wanted]}
    layout: Layout = {file: [] for file in manifest.finetuned.files}
    files = list(layout)
    if request.shard_bytes is not None:
        inner = {t.name: files[t.file] for t in wanted if "/" in files[t.file]}
        specs = [_spec(tensor) for tensor in wanted]
        return plan_shards(specs, request.shard_bytes, inner, stem_of(files))
    for tensor in wanted:
        layout[files[tensor.file]].append(_spec(tensor))
    return layout


def _content(archive: Archive, base: str, wanted: list[Tensor]) -> Record:
    totals = archive_totals(archive)
    return {
        "archive": str(archive.folder),
        "base": base,
        "method": archive.manifest.method,
        "archive_bytes": totals["archive_bytes"],
        "file_ratio": totals["file_ratio"],
        "nominal_ratio": totals["nominal_ratio"],
        "settings": json.loads(json.dumps(archive.manifest.budget)),
        "tensors_restored": len(wanted),
    }
