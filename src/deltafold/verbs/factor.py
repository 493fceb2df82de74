"""Singular triplets of the deltas whose codec wants them, kept in the workspace."""

from __future__ import annotations

from deltafold.budget import reach
from deltafold.codecs.base import DeltaCodec, Shape
from deltafold.engine import Resources, Task
from deltafold.linalg import (
    Factors,
    is_randomised,
    noise_edge,
    svd_memory_bytes,
    truncated_svd,
)
from deltafold.verbs.job import Job
from deltafold.verbs.pair import DeltaRows
from deltafold.verbs.planned import Plan, PlannedPiece, PlannedTensor
from deltafold.verbs.workspace import Workspace

FLAT_MARGIN = 1.1  # a spectrum is flat if nothing rises this far above the noise edge


def factor_all(
    job: Job, plan: Plan, share: float, workspace: Workspace, resources: Resources
) -> None:
    """Singular triplets of each piece whose codec wants them, as many as the share can use."""

    def factor(tensor: PlannedTensor, piece: PlannedPiece) -> None:
        codec = job.codec(piece.codec)
        rows = tensor.delta(job, piece)
        limit = reach(rows.shape, share)
        key = job.key(tensor.pairing.name, piece.start)
        rank = codec.components_for(rows.shape, limit)
        while True:
            factors = truncated_svd(rows, rank, key)
            spectrum = factors.s.double().numpy()
            used = codec.components_used(rows.shape, limit, spectrum)
            if used is not None or factors.rank < rank or rank >= min(rows.shape):
                break
            rank = min(4 * rank, *rows.shape)
        keep = factors.rank if used is None else min(used, factors.rank)
        file = f"factors/{piece.stem}.safetensors"
        workspace.save_tensors(
            file, {"u": factors.u[:, :keep].T, "s": factors.s[:keep], "v": factors.v[:, :keep].T}
        )

    tasks = []
    wanted = [(t, p) for t, p in plan.lossy if job.codec(p.codec).uses_factors]
    for tensor, piece in wanted:
        if workspace.has(f"factors/{piece.stem}.safetensors"):
            continue
        shape = tensor.shape(piece)
        tasks.append(
            Task(
                tensor.pairing.name,
                lambda t=tensor, p=piece: factor(t, p),  # type: ignore[misc]
                memory_bytes=factor_memory_bytes(job.codec(piece.codec), shape, share),
                work=float(shape[0] * shape[1] * min(shape)),
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
