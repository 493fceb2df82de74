"""The exact size of an archive before it is written: its draft manifest and payload layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from deltafold.archive import BaseRows, CodecEntry, Manifest, Piece, Source, Tensor, TensorDigest
from deltafold.archive.manifest import PayloadFile, version_of
from deltafold.archive.writer import payload_bytes
from deltafold.checkpoint import Checkpoint, tensor_bytes
from deltafold.checkpoint.writer import TensorSpec
from deltafold.codecs import get
from deltafold.codecs.base import Settings
from deltafold.compressing.job import CompressJob
from deltafold.compressing.methods.budget import Unit
from deltafold.compressing.planned import Plan, PlannedPiece, PlannedTensor
from deltafold.compressing.survey import CHUNK_BYTES
from deltafold.version import __version__

_DRAFT_CHECKSUM = "0" * 16
_DRAFT_ERROR = 0.1234  # as many digits as a real one


def units(job: CompressJob, plan: Plan) -> list[Unit]:
    return [
        Unit(
            tensor.pairing.name,
            tensor.shape(piece),
            job.codec(piece.codec),
            piece.spectrum,
        )
        for tensor, piece in plan.lossy
    ]


def part_specs(job: CompressJob, plan: Plan, manifest: Manifest) -> list[TensorSpec]:
    """All parts of the payload in order: name, dtype, shape. `manifest` is the plan's draft."""
    specs: list[TensorSpec] = []
    for planned, tensor in zip(plan.tensors, manifest.tensors, strict=True):
        for ours, piece in zip(planned.pieces, tensor.pieces, strict=True):
            for part, dtype, shape in _piece_specs(job, planned, ours):
                specs.append((tensor.part_name(piece, part), dtype, shape))
    return specs


def _piece_specs(job: CompressJob, tensor: PlannedTensor, piece: PlannedPiece) -> list[TensorSpec]:
    if piece.exact is not None:
        sizes: dict[str, int] = piece.exact["sizes"]
        return [(part, "U8", (size,)) for part, size in sorted(sizes.items())]
    if not piece.lossy:
        return []
    layout = job.codec(piece.codec).layout(tensor.shape(piece), piece.settings)
    return [(n, spec.dtype_name, spec.shape) for n, spec in sorted(layout.items())]


def archive_bytes(job: CompressJob, plan: Plan) -> int:
    """Exact bytes of the archive that this plan gives (but for digits of error figures)."""
    _, frames = job.side_files
    manifest = draft_manifest(job, plan)
    return (
        len(manifest.to_text().encode())
        + payload_bytes(part_specs(job, plan, manifest))
        + sum(len(frame) for frame in frames.values())
    )


def fixed_bytes(job: CompressJob, plan: Plan) -> int:
    """Bytes that are spent whatever the lossy pieces get."""
    saved = [(piece, piece.settings) for _, piece in plan.lossy]
    for tensor, piece in plan.lossy:
        codec = job.codec(piece.codec)
        piece.settings = codec.settings_for(tensor.shape(piece), 0.0, np.zeros(0))
    fixed = archive_bytes(job, plan)
    for piece, settings in saved:
        piece.settings = settings
    return fixed


def draft_manifest(job: CompressJob, plan: Plan) -> Manifest:
    """The manifest of the plan as it stands; checksums not known yet are filled with zeros."""
    pair = job.pair
    used = sorted({piece.codec for tensor in plan.tensors for piece in tensor.pieces})
    config: dict[str, dict[str, Any]] = {
        name: job.codec(name).config.to_json() if get(name).lossy else {} for name in used
    }
    files = {file: number for number, file in enumerate(pair.finetuned.shards)}
    removed = {name: _removed_digest(job, name) for name in pair.removed}
    tensors = tuple(_manifest_tensor(job, tensor, files) for tensor in plan.tensors)
    return Manifest(
        format_version=version_of(tensors, job.side_files[0]),  # type: ignore[arg-type]
        tool_version=__version__,
        method=job.method,
        seed=job.seed,
        budget={"kind": job.budget.kind, "asked": job.budget.asked} if job.budget else {},
        codecs={n: CodecEntry(version=get(n).version, config=config[n]) for n in used},
        base=_source(pair.origin),
        finetuned=_source(pair.finetuned),
        removed=removed,
        payload=(PayloadFile(name="payload-00001-of-00001.safetensors", n_bytes=10**9),),
        files=job.side_files[0],
        tensors=tensors,
        totals={"checkpoint_bytes": pair.finetuned.total_bytes},
    )


def _manifest_tensor(job: CompressJob, planned: PlannedTensor, files: dict[Path, int]) -> Tensor:
    pairing, survey = planned.pairing, planned.survey
    found = pairing.found if survey.base_digest else ()
    return Tensor(
        name=pairing.name,
        dtype=pairing.tuned.dtype,
        shape=pairing.tuned.shape,
        file=files[pairing.tuned.file],
        base=survey.base_digest,
        counterpart=tuple(BaseRows(name=name, rows=(a, b)) for name, a, b in found),
        tuned=survey.tuned_digest,
        restored=(planned.restored or _DRAFT_CHECKSUM) if planned.lossy else None,
        same_as=planned.same_as,
        pieces=tuple(_manifest_piece(job, planned, piece) for piece in planned.pieces),
    )


def _manifest_piece(job: CompressJob, tensor: PlannedTensor, piece: PlannedPiece) -> Piece:
    n_rows = tensor.pairing.tuned.matrix_shape[0]
    whole = (piece.start, piece.stop) == (0, n_rows)
    checksums = piece.checksums or {
        name: _DRAFT_CHECKSUM for name, _, _ in _piece_specs(job, tensor, piece)
    }
    return Piece(
        codec=piece.codec,
        rows=None if whole else (piece.start, piece.stop),
        reference=piece.reference,  # type: ignore[arg-type]
        settings=piece.settings,
        parts=checksums,
        why=piece.why,
        error=(piece.error if piece.error is not None else _DRAFT_ERROR) if piece.lossy else None,
    )


def _source(checkpoint: Checkpoint) -> Source:
    return Source(
        label="",  # no byte depends on what a folder is called
        total_bytes=checkpoint.total_bytes,
        files=tuple(map(checkpoint.relative, checkpoint.shards)),
        metadata=checkpoint.metadata,
    )


def _removed_digest(job: CompressJob, name: str) -> str:
    """Digest of a tensor that only the base has (read once, kept)."""
    cache: dict[str, str] = job.__dict__.setdefault("_removed_digests", {})
    if name not in cache:
        info = job.pair.origin.tensors[name]
        digest = TensorDigest(info.dtype, info.shape)
        for _, rows in job.pair.origin.row_chunks(name, CHUNK_BYTES):
            digest.update(tensor_bytes(rows))
        cache[name] = digest.identity()
    return cache[name]


def smallest_settings(matrices: list[Unit]) -> list[Settings]:
    """Nothing kept but one value or component of each matrix."""
    return [
        unit.codec.settings_for(unit.shape, sum(unit.shape) / math.prod(unit.shape), unit.spectrum)
        for unit in matrices
    ]


def smallest_bytes(job: CompressJob, plan: Plan, matrices: list[Unit]) -> int:
    """Bytes of the archive with `smallest_settings`."""
    held = [piece.settings for _, piece in plan.lossy]
    for (_, piece), settings in zip(plan.lossy, smallest_settings(matrices), strict=True):
        piece.settings = settings
    smallest = archive_bytes(job, plan)
    for (_, piece), settings in zip(plan.lossy, held, strict=True):
        piece.settings = settings
    return smallest
