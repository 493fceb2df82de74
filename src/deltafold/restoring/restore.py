"""`restore`: base and archive become an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from deltafold.archive import Archive, Tensor
from deltafold.archive.manifest import Manifest
from deltafold.checkpoint import CheckpointWriter, open_checkpoint, plan_shards
from deltafold.checkpoint.writer import TensorSpec, guard_storage
from deltafold.dtypes import stored_bytes
from deltafold.errors import UsageError, nearest
from deltafold.restoring.decode import check_base_headers, check_codecs, checked_rows
from deltafold.running.cluster import check_engine, open_engine
from deltafold.running.devices import computes
from deltafold.running.engine import Progress, Resources, Task
from deltafold.running.record import (
    RECORD_VERSION,
    Meter,
    Record,
    check_record_path,
    machine,
    record_path,
    write_record,
)
from deltafold.running.stored import storable
from deltafold.running.workspace import Workspace, check_output, check_space

TASK_MEMORY_BYTES = 200 << 20


@storable
@computes
def restore(
    archive: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    tensors: list[str] | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str | None = None,
    workers: int | None = None,
    memory_bytes: int | None = None,
    engine: str = "threads",
    progress: Progress | None = None,
    record: str | Path | None = None,
) -> Record:
    """Restore the fine-tune of `archive` on `base` into the folder `output`; returns the record.

    The weight files are laid out as the fine-tune's were (same names, order and metadata), or in
    shards of `shard_bytes`. `tensors` restores only the named ones, into one file. `device` is where
    heavy steps compute: `cpu` (default), `cuda`, `cuda:N` or `auto`. `engine`: `threads`, or `ray`
    for a cluster; it changes no byte. Raises
    MismatchError for a wrong base, ArchiveError for a damaged archive; nothing is left under
    `output` then.
    """
    out = Path(output)
    check_output(out, overwrite, [archive, base])
    check_record_path(record)
    check_engine(engine)
    with (
        Meter() as meter,
        Archive(Path(archive)) as opened,
        open_checkpoint(base) as base_checkpoint,
    ):
        manifest = opened.manifest
        check_codecs(opened)
        check_base_headers(opened, base_checkpoint)
        wanted = _wanted(manifest, tensors)
        layout = _layout(manifest, wanted, shard_bytes, tensors is not None)
        check_space(out, sum(_tensor_size(tensor) for tensor in wanted))
        identity = {
            "command": "restore",
            "archive": opened.identity,
            "base": base_checkpoint.fingerprint(),
            "layout": {file: [spec[0] for spec in specs] for file, specs in layout.items()},
        }
        with (
            open_engine(engine, workers, memory_bytes) as runner,
            Workspace(out, identity, restart) as workspace,
        ):
            folder = workspace.folder / "restored"
            guard_storage(folder, lambda: folder.mkdir(exist_ok=True))
            writer = CheckpointWriter(
                folder, layout, manifest.finetuned.metadata or {"format": "pt"}
            )

            done = {t.name: f"done/{n:06d}.json" for n, t in enumerate(manifest.tensors)}

            def one(tensor: Tensor) -> None:
                columns = tensor.matrix_shape[1]
                for start, rows in checked_rows(opened, tensor, base_checkpoint):
                    writer.write(tensor.name, rows, start * columns)
                workspace.save_json(done[tensor.name], True)

            tasks = [
                Task(t.name, lambda t=t: one(t), TASK_MEMORY_BYTES, float(_tensor_size(t)))  # type: ignore[misc]
                for t in wanted
                if not workspace.has(done[t.name])
            ]
            try:
                Resources(workers, memory_bytes, progress, runner).run("restore", tasks)
                writer.finish()
            finally:
                writer.close()
            for entry in manifest.files if tensors is None else ():
                data = opened.side_file(entry, base_checkpoint)
                path = folder / entry.name
                guard_storage(path, lambda p=path, d=data: p.write_bytes(d))  # type: ignore[misc]
            workspace.publish("restored", overwrite)
        result = _record(opened, base_checkpoint.label, out, wanted, meter)
    result |= {"seconds": meter.seconds, "peak_memory_bytes": meter.peak_memory_bytes}
    if runner:
        result["engine"] = runner.to_record()
    write_record(result, Path(record) if record else record_path(out))
    return result


def _wanted(manifest: Manifest, names: list[str] | None) -> list[Tensor]:
    if names is None:
        return list(manifest.tensors)
    known = {tensor.name: tensor for tensor in manifest.tensors}
    for name in names:
        if name not in known:
            close = nearest(name, sorted(known)).partition("Known:")[0]
            raise UsageError(f"The archive has no tensor {name!r}; {close}see deltafold inspect.")
    return [known[name] for name in dict.fromkeys(names)]


def _tensor_size(tensor: Tensor) -> int:
    return stored_bytes(tensor.dtype, tensor.shape)


def _spec(tensor: Tensor) -> TensorSpec:
    return (tensor.name, tensor.dtype, tensor.shape)


def _layout(
    manifest: Manifest, wanted: list[Tensor], shard_bytes: int | None, partial: bool
) -> dict[str, list[TensorSpec]]:
    if partial:
        return {"model.safetensors": [_spec(tensor) for tensor in wanted]}
    if shard_bytes is not None:
        return plan_shards([_spec(tensor) for tensor in wanted], shard_bytes)
    layout: dict[str, list[TensorSpec]] = {file: [] for file in manifest.finetuned.files}
    files = list(layout)
    for tensor in wanted:
        layout[files[tensor.file]].append(_spec(tensor))
    return layout


def _record(
    archive: Archive, base: str, output: Path, wanted: list[Tensor], meter: Meter
) -> Record:
    from deltafold.restoring.totals import archive_totals

    totals = archive_totals(archive)
    return {
        "record_version": RECORD_VERSION,
        "kind": "restore",
        "archive": str(archive.folder),
        "base": base,
        "output": str(output),
        "method": archive.manifest.method,
        "archive_bytes": totals["archive_bytes"],
        "file_ratio": totals["file_ratio"],
        "nominal_ratio": totals["nominal_ratio"],
        "settings": json.loads(json.dumps(archive.manifest.budget)),
        "tensors_restored": len(wanted),
        "machine": machine(),
    }
