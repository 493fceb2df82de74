"""The changed base of `export --rest fold`: what no pair says is written into it.

Projections stay the base's, since the adapter changes them; all else is the restored fine-tune's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from deltafold.archive import Tensor
from deltafold.checkpoint import CheckpointWriter
from deltafold.checkpoint.writer import TensorSpec, guard_storage, put_file
from deltafold.exporting.job import ExportJob
from deltafold.restoring.decode import checked_rows
from deltafold.running.engine import Resources, Task

BASE_FOLDER = "base"
CHUNK_BYTES = 16 << 20


def write_folded_base(job: ExportJob, folder: Path, resources: Resources) -> None:
    """An ordinary folder, laid out as the fine-tune's was, with the fine-tune's side files."""
    guard_storage(folder, lambda: folder.mkdir(exist_ok=True))
    manifest = job.archive.manifest
    layout: dict[str, list[TensorSpec]] = {file: [] for file in manifest.finetuned.files}
    files = list(layout)
    hows = {item.name: item.how for item in job.items}
    kept = {name for name, how in hows.items() if how in ("pair", "equal")}
    for tensor in manifest.tensors:
        dtype, shape = tensor.dtype, tensor.shape
        if tensor.name in kept:
            info = job.base.tensors[tensor.name]
            dtype, shape = info.dtype, info.shape
        layout[files[tensor.file]].append((tensor.name, dtype, shape))
    writer = CheckpointWriter(folder, layout, manifest.finetuned.metadata or {"format": "pt"})

    def one(tensor: Tensor) -> None:
        columns = tensor.matrix_shape[1]
        chunks = (
            job.base.row_chunks(tensor.name, CHUNK_BYTES)
            if tensor.name in kept
            else checked_rows(job.archive, tensor, job.base)
        )
        for start, rows in chunks:
            writer.write(tensor.name, rows, start * columns)

    tasks = [
        Task(t.name, partial(one, t), 200 << 20, float(len(t.shape))) for t in manifest.tensors
    ]
    try:
        resources.run("base", tasks)
        writer.finish()
    finally:
        writer.close()
    for entry in manifest.files:
        put_file(folder, entry.name, job.archive.side_file(entry, job.base))
