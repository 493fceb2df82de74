"""A draft written as an ordinary Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from deltafold.checkpoint import DTYPES, Checkpoint, CheckpointWriter, plan_shards
from deltafold.checkpoint.beside import write_beside
from deltafold.checkpoint.json_files import CONFIG_FILE
from deltafold.checkpoint.writer import guard_storage
from deltafold.coding.sums import all_finite
from deltafold.errors import NonFiniteError
from deltafold.folding.config import Shortened, config_bytes
from deltafold.folding.methods.draft import Draft
from deltafold.running.engine import Resources, Task


def new_names(draft: Draft, checkpoint: Checkpoint) -> dict[str, str]:
    """The name that each tensor of the draft is written under -> its name in the model.

    Blocks are numbered anew from 0; the order is the model's.
    """
    places = {number: place for place, number in enumerate(draft.numbers)}
    found = {}
    for name in checkpoint.tensors:
        split = draft.layout.split(name)
        if split is None:
            found[name] = name
        elif split[0] in places:
            found[draft.layout.name(places[split[0]], split[1])] = name
    return found


def write_draft(
    draft: Draft,
    checkpoint: Checkpoint,
    found: Shortened,
    folder: Path,
    shard_bytes: int,
    resources: Resources,
) -> None:
    """Weights in the model's dtypes, the config of what is left, and every side file as it was.

    Raises NonFiniteError, StorageError.
    """
    guard_storage(folder, lambda: folder.mkdir(exist_ok=True))
    names = new_names(draft, checkpoint)
    shapes = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
    shapes |= {name: part.shape(shapes[name]) for name, part in found.grown.items()}
    specs = [(name, checkpoint.tensors[old].dtype, shapes[old]) for name, old in names.items()]
    writer = CheckpointWriter(
        folder,
        plan_shards(specs, shard_bytes, checkpoint.inner_files),
        checkpoint.metadata or {"format": "pt"},
    )

    def write(name: str, old: str) -> None:
        tensor = draft.tensor(old)
        if old in found.grown:
            tensor = found.grown[old].cut(tensor)
        if not all_finite(tensor):
            raise NonFiniteError(f"{old} of {checkpoint.label}, folded, holds NaN or infinity.")
        writer.write(name, tensor.to(DTYPES[checkpoint.tensors[old].dtype]).contiguous())

    tasks = [
        Task(
            name,
            partial(write, name, old),
            memory_bytes=16 * math.prod(checkpoint.tensors[old].shape),
            work=float(math.prod(checkpoint.tensors[old].shape)),
        )
        for name, old in names.items()
    ]
    try:
        resources.run("write", tasks)
        writer.finish()
    finally:
        writer.close()
    write_beside(checkpoint, folder, {CONFIG_FILE: config_bytes(found.config)})
