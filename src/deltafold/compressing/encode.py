"""Encode the lossy pieces of a plan: parts into the workspace, each checked by decoding it again."""

from __future__ import annotations

import math
from functools import partial

from deltafold.codecs.base import DeltaCodec, Parts, Settings, parts_bytes
from deltafold.compressing.job import CompressJob
from deltafold.compressing.pair import DeltaRows
from deltafold.compressing.planned import Plan, PlannedPiece, PlannedTensor
from deltafold.compressing.triplets import load_factors
from deltafold.lazy import torch
from deltafold.linalg.matrices import RowMatrix
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace, checksum


def encode_lossy(job: CompressJob, plan: Plan, workspace: Workspace, resources: Resources) -> None:
    """Encode what is not yet encoded; fills in each piece's settings, checksums and error."""

    def encode(tensor: PlannedTensor, piece: PlannedPiece) -> int:
        rows = tensor.delta(job, piece)
        codec, key = job.codec(piece.codec), job.key(tensor.pairing.name, piece.start)
        asked = piece.settings
        moments = job.moments(tensor.pairing.name) if codec.uses_moments else None
        settings, parts = codec.encode(rows, asked, key, load_factors(workspace, piece), moments)
        error = relative_error(codec, parts, settings, rows, key)
        file = f"lossy/{piece.stem}.safetensors"
        workspace.save_tensors(file, parts)
        workspace.save_json(
            f"lossy/{piece.stem}.json",
            {
                "asked": asked,
                "settings": settings,
                "checksums": {name: checksum(part) for name, part in sorted(parts.items())},
                "error": error,
            },
            of=[file],
        )
        return parts_bytes(parts)

    tasks = []
    for tensor, piece in plan.lossy:
        done = f"lossy/{piece.stem}.json"
        if workspace.has(done) and workspace.load_json(done)["asked"] == piece.settings:
            continue
        elements = (piece.stop - piece.start) * tensor.pairing.tuned.matrix_shape[1]
        tasks.append(
            Task(
                tensor.pairing.name,
                partial(encode, tensor, piece),
                memory_bytes=task_memory_bytes(tensor, piece),
                work=float(elements),
            )
        )
    resources.run("encode", tasks)
    for _, piece in plan.lossy:
        done = workspace.load_json(f"lossy/{piece.stem}.json")
        piece.settings, piece.checksums = done["settings"], done["checksums"]
        piece.error = done["error"]


def task_memory_bytes(tensor: PlannedTensor, piece: PlannedPiece) -> int:
    """Peak memory of encoding one piece."""
    elements = (piece.stop - piece.start) * tensor.pairing.tuned.matrix_shape[1]
    return min(4 * elements, DeltaRows.KEEP_BYTES) + (160 << 20)


def relative_error(
    codec: DeltaCodec, parts: Parts, settings: Settings, delta: RowMatrix, key: int
) -> float:
    """||D - D^|| / ||D||, D (o, i), four digits, from the parts as they will be read back."""
    wrong = total = 0.0
    for start, approximate in codec.decode(parts, settings, delta.shape, key):
        true = delta.rows(start, start + len(approximate))
        wrong += float((true - approximate).square().sum(dtype=torch.float64))
        total += float(true.square().sum(dtype=torch.float64))
    return float(f"{math.sqrt(wrong / total) if total else 0.0:.4g}")
