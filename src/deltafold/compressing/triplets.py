"""Singular triplets of the deltas whose codec wants them, kept in the workspace."""

from __future__ import annotations

from functools import partial

from deltafold.codecs.base import DeltaCodec, Shape
from deltafold.codecs.tensors import enough_triplets
from deltafold.compressing.job import CompressJob
from deltafold.compressing.methods.budget import reach
from deltafold.compressing.pair import DeltaRows
from deltafold.compressing.planned import Plan, PlannedPiece, PlannedTensor
from deltafold.linalg.decomposition import (
    is_randomised,
    noise_edge,
    svd_memory_bytes,
    truncated_svds,
)
from deltafold.linalg.matrices import Factors
from deltafold.running.devices import place
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace

Wanted = tuple[PlannedTensor, PlannedPiece]

BATCH_BYTES = 2 << 30  # of a GPU's memory, for pieces in one batched call
FLAT_MARGIN = 1.1  # a spectrum is flat if nothing rises this far above the noise edge


def factor_all(
    job: CompressJob, plan: Plan, share: float, workspace: Workspace, resources: Resources
) -> None:
    """Singular triplets of each piece whose codec wants them, as many as the share can use."""

    def factor(group: list[Wanted], rank: int) -> None:
        deltas = [tensor.delta(job, piece) for tensor, piece in group]
        keys = [job.key(tensor.pairing.name, piece.start) for tensor, piece in group]
        made = truncated_svds(deltas, rank, keys)
        for (_, piece), rows, key, factors in zip(group, deltas, keys, made, strict=True):
            save(piece, rows, key, factors, rank)

    def save(piece: PlannedPiece, rows: DeltaRows, key: int, factors: Factors, rank: int) -> None:
        codec, limit = job.codec(piece.codec), reach(rows.shape, share)
        kept = enough_triplets(codec, rows, limit, key, factors, rank)
        file = f"factors/{piece.stem}.safetensors"
        workspace.save_tensors(file, {"u": kept.u.T, "s": kept.s, "v": kept.v.T})

    tasks = []
    wanted = [(t, p) for t, p in plan.lossy if job.codec(p.codec).uses_factors]
    for group in _batches(job, wanted, share):
        if all(workspace.has(f"factors/{p.stem}.safetensors") for _, p in group):
            continue
        tensor, piece = group[0]
        codec, shape = job.codec(piece.codec), tensor.shape(piece)
        rank = codec.components_for(shape, reach(shape, share))
        tasks.append(
            Task(
                tensor.pairing.name,
                partial(factor, group, rank),
                memory_bytes=len(group) * factor_memory_bytes(codec, shape, share),
                work=float(len(group) * shape[0] * shape[1] * min(shape)),
            )
        )
    resources.run("factor", tasks)
    for tensor, piece in wanted:
        s = workspace.load_tensor(f"factors/{piece.stem}.safetensors", "s")
        piece.spectrum = s.double().numpy()
        shape = tensor.shape(piece)
        edge = FLAT_MARGIN * noise_edge(shape, piece.delta_squared)
        if job.fallback and (not len(s) or float(s[0]) <= edge):
            piece.codec, piece.spectrum, piece.why = "dare", None, "flat spectrum: not low-rank"


def _batches(job: CompressJob, wanted: list[Wanted], share: float) -> list[list[Wanted]]:
    """Pieces one by one; where a GPU computes, some of one codec and shape together.

    How many depends on nothing but these: a batch of another size may round differently. What is
    not held whole goes alone.
    """
    if not place().batched:
        return [[each] for each in wanted]
    groups: dict[tuple[str, Shape], list[Wanted]] = {}
    for tensor, piece in wanted:
        groups.setdefault((piece.codec, tensor.shape(piece)), []).append((tensor, piece))
    found = []
    for (codec, shape), group in groups.items():
        delta_bytes = 4 * shape[0] * shape[1]
        needed = factor_memory_bytes(job.codec(codec), shape, share) + 4 * delta_bytes
        size = max(1, BATCH_BYTES // needed) if delta_bytes <= DeltaRows.KEEP_BYTES else 1
        found += [group[start : start + size] for start in range(0, len(group), size)]
    return found


def factor_memory_bytes(codec: DeltaCodec, shape: Shape, share: float) -> int:
    """Peak memory of one factoring task."""
    held = min(4 * shape[0] * shape[1], DeltaRows.KEEP_BYTES)
    rank = codec.components_for(shape, reach(shape, share))
    if shape[0] < shape[1] and not is_randomised(shape, rank):
        held = 4 * shape[0] * shape[1]  # a wide matrix is held whole for its Gram matrix
    return svd_memory_bytes(shape, rank) + 2 * held


def load_factors(workspace: Workspace, piece: PlannedPiece) -> Factors | None:
    """Factors saved for a piece, if its codec uses any."""
    if piece.spectrum is None:
        return None
    found = workspace.load_tensors(f"factors/{piece.stem}.safetensors")
    return Factors(found["u"].T, found["s"], found["v"].T)
