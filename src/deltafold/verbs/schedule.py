"""From weights to a plan: what each piece of each tensor is stored by, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltafold.archive import CodecEntry, Manifest, Piece, Source, Tensor
from deltafold.archive.writer import payload_bytes
from deltafold.budget import Unit, allot, reach, refuse, share_within
from deltafold.checkpoint import DTYPE_NAMES
from deltafold.checkpoint.writer import TensorSpec
from deltafold.codecs import get
from deltafold.codecs.base import Settings, Spectrum
from deltafold.engine import Task, run_tasks
from deltafold.linalg import Factors, noise_edge, truncated_svd
from deltafold.verbs.job import Job
from deltafold.verbs.pair import DeltaRows, Pairing
from deltafold.verbs.survey import CHUNK_BYTES, SpanSurvey, TensorSurvey, span_of, survey_tensor
from deltafold.verbs.workspace import Workspace
from deltafold.version import __version__

if TYPE_CHECKING:
    from deltafold.verbs.compress import Resources

FLAT_MARGIN = 1.1  # a spectrum is flat if nothing rises this far above the noise edge
_DRAFT_CHECKSUM = "0" * 16


@dataclass
class PlannedPiece:
    """One piece to store. `exact` describes a piece encoded already; otherwise it is lossy."""

    codec: str
    start: int
    stop: int
    reference: str = "base"
    why: str | None = None
    exact: dict[str, Any] | None = None
    stem: str = ""  # names the piece's files in the workspace
    settings: Settings = field(default_factory=dict)
    spectrum: Spectrum | None = None
    delta_squared: float = 0.0
    checksums: dict[str, str] = field(default_factory=dict)
    error: float | None = None

    @property
    def lossy(self) -> bool:
        return self.exact is None and self.codec != "skip"


@dataclass
class PlannedTensor:
    pairing: Pairing
    survey: TensorSurvey
    pieces: list[PlannedPiece]
    same_as: str | None = None


@dataclass
class Plan:
    tensors: list[PlannedTensor]

    @property
    def lossy(self) -> list[tuple[PlannedTensor, PlannedPiece]]:
        return [(t, p) for t in self.tensors for p in t.pieces if p.lossy]


def schedule(job: Job, workspace: Workspace, resources: Resources) -> Plan:
    """Survey, decide, factor, allot. Raises BudgetError, NonFiniteError."""
    surveys = _survey_all(job, workspace, resources)
    plan = _decide(job, surveys)
    if job.budget is None or not plan.lossy:
        return plan
    if job.budget.kind == "nominal_ratio":
        share = 1.0 / job.budget.asked
    else:
        share = _prefer_exact(job, plan)
    _factor_all(job, plan, share, workspace, resources)
    _allot(job, plan, share)
    return plan


def _survey_all(job: Job, workspace: Workspace, resources: Resources) -> list[TensorSurvey]:
    pair = job.pair

    def survey(index: int, pairing: Pairing) -> None:
        found = survey_tensor(pair, pairing, index, workspace, job.exact_method)
        workspace.save_json(f"survey/{index:06d}.json", found.to_json())

    tasks = [
        Task(
            pairing.name,
            lambda i=index, p=pairing: survey(i, p),  # type: ignore[misc]
            memory_bytes=8 * min(CHUNK_BYTES, pairing.tuned.n_bytes) + (1 << 20),
            work=pairing.tuned.n_bytes,
        )
        for index, pairing in enumerate(pair.pairings)
        if not workspace.has(f"survey/{index:06d}.json")
    ]
    run_tasks("survey", tasks, resources.workers, resources.memory_bytes, resources.progress)
    return [
        TensorSurvey.from_json(workspace.load_json(f"survey/{index:06d}.json"))
        for index in range(len(pair.pairings))
    ]


def _decide(job: Job, surveys: list[TensorSurvey]) -> Plan:
    """First decision, before the budget: equal, twin, exact because it must be, or lossy."""
    first_with: dict[str, str] = {}
    tensors = []
    for index, (pairing, survey) in enumerate(zip(job.pair.pairings, surveys, strict=True)):
        equal = all(span.equal for span in survey.spans)
        twin = first_with.setdefault(survey.tuned_digest, pairing.name)
        if not equal and twin != pairing.name:
            tensors.append(PlannedTensor(pairing, survey, [], same_as=twin))
            continue
        pieces: list[PlannedPiece] = []
        for number, span in enumerate(survey.spans):
            pieces += _pieces(job, span, f"{index:06d}-{number}")
        tensors.append(PlannedTensor(pairing, survey, _joined(pieces)))
    return Plan(tensors)


def _pieces(job: Job, span: SpanSurvey, stem: str) -> list[PlannedPiece]:
    if span.stop == span.start:
        return []
    if span.equal:
        return [PlannedPiece("skip", span.start, span.stop)]
    if job.exact_method is None and span.lossy_allowed:
        return [
            PlannedPiece(
                job.method, span.start, span.stop, stem=stem, delta_squared=span.delta_squared
            )
        ]
    return _exact_pieces(span, None if span.in_base else "only in the fine-tune")


def _exact_pieces(span: SpanSurvey, why: str | None) -> list[PlannedPiece]:
    return [
        PlannedPiece(
            piece["codec"],
            *piece["rows"],
            reference="base" if span.in_base else "none",
            why=why,
            exact=piece,
            settings=piece["settings"],
            checksums=piece["parts"],
        )
        for piece in span.exact
    ]


def _joined(pieces: list[PlannedPiece]) -> list[PlannedPiece]:
    """Neighbouring `skip` pieces as one."""
    joined: list[PlannedPiece] = []
    for piece in pieces:
        if joined and piece.codec == joined[-1].codec == "skip":
            joined[-1].stop = piece.stop
        else:
            joined.append(piece)
    return joined


def _prefer_exact(job: Job, plan: Plan) -> float:
    """Turn lossy pieces exact where that costs no more than their share; returns the share.

    Cheapest first; each one that turns exact below its share leaves more for the others.
    """
    assert job.budget is not None
    checkpoint_bytes = job.pair.finetuned.total_bytes
    target = job.budget.target_bytes(checkpoint_bytes)
    assert target is not None
    candidates = sorted(
        (
            (_exact_bytes(tensor, piece) / _raw_bytes(tensor, piece), tensor, piece)
            for tensor, piece in (plan.lossy if job.fallback else [])
            if _span_survey(tensor, piece).exact
        ),
        key=lambda item: (item[0], item[1].pairing.name, item[2].start),
    )
    share = share_within(_units(job, plan), target - _fixed_bytes(job, plan))
    for cost, tensor, piece in candidates:
        if cost <= share:
            at = tensor.pieces.index(piece)
            tensor.pieces[at : at + 1] = _exact_pieces(
                _span_survey(tensor, piece), "few values changed: exact costs less"
            )
            share = share_within(_units(job, plan), target - _fixed_bytes(job, plan))
        else:
            changed = _span_survey(tensor, piece).changed_values
            elements = (piece.stop - piece.start) * tensor.pairing.tuned.matrix_shape[1]
            if changed <= 0.1 * elements and job.codec(piece.codec).uses_factors:
                piece.codec, piece.why = "magnitude", "90 % of values equal: not low-rank"
    if plan.lossy and share <= 0:
        raise refuse(job.budget, checkpoint_bytes, _fixed_bytes(job, plan), job.method)
    return share


def _span_survey(tensor: PlannedTensor, piece: PlannedPiece) -> SpanSurvey:
    return next(s for s in tensor.survey.spans if (s.start, s.stop) == (piece.start, piece.stop))


def _exact_bytes(tensor: PlannedTensor, piece: PlannedPiece) -> int:
    return _span_survey(tensor, piece).exact_bytes


def _raw_bytes(tensor: PlannedTensor, piece: PlannedPiece) -> int:
    return (piece.stop - piece.start) * tensor.pairing.tuned.matrix_shape[1] * 2


def _units(job: Job, plan: Plan) -> list[Unit]:
    return [
        Unit(
            tensor.pairing.name,
            (piece.stop - piece.start, tensor.pairing.tuned.matrix_shape[1]),
            job.codec(piece.codec),
            piece.spectrum,
        )
        for tensor, piece in plan.lossy
    ]


def _factor_all(
    job: Job, plan: Plan, share: float, workspace: Workspace, resources: Resources
) -> None:
    """Singular triplets of each piece whose codec wants them, as many as the share can use."""

    def factor(tensor: PlannedTensor, piece: PlannedPiece) -> None:
        codec = job.codec(piece.codec)
        rows = DeltaRows(job.pair, tensor.pairing, span_of(_span_survey(tensor, piece)))
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
        shape = (piece.stop - piece.start, tensor.pairing.tuned.matrix_shape[1])
        tasks.append(
            Task(
                tensor.pairing.name,
                lambda t=tensor, p=piece: factor(t, p),  # type: ignore[misc]
                memory_bytes=_svd_memory_bytes(shape),
                work=float(shape[0] * shape[1] * min(shape)),
            )
        )
    run_tasks("factor", tasks, resources.workers, resources.memory_bytes, resources.progress)
    for tensor, piece in wanted:
        s = workspace.load_tensors(f"factors/{piece.stem}.safetensors")["s"]
        piece.spectrum = s.double().numpy()
        shape = (piece.stop - piece.start, tensor.pairing.tuned.matrix_shape[1])
        edge = FLAT_MARGIN * noise_edge(shape, piece.delta_squared)
        if job.fallback and (not len(s) or float(s[0]) <= edge):
            piece.codec, piece.spectrum, piece.why = "dare", None, "flat spectrum: not low-rank"


def _svd_memory_bytes(shape: tuple[int, int]) -> int:
    small, large = min(shape), max(shape)
    held = min(4 * small * large, 2 * DeltaRows.KEEP_BYTES)
    return 5 * 8 * small * small + 2 * held + (96 << 20)


def load_factors(workspace: Workspace, piece: PlannedPiece) -> Factors | None:
    """Factors saved for a piece, if its codec uses any."""
    if piece.spectrum is None:
        return None
    found = workspace.load_tensors(f"factors/{piece.stem}.safetensors")
    return Factors(found["u"].T, found["s"], found["v"].T)


def _allot(job: Job, plan: Plan, share: float) -> None:
    """Settings for every lossy piece, so that the archive meets the budget.

    The manifest's length depends on the settings and the settings on what the manifest leaves: a
    few rounds settle it. What is left over after a round is spread over all in the next.
    """
    assert job.budget is not None
    units = _units(job, plan)
    nominal = job.budget.kind == "nominal_ratio"
    checkpoint_bytes = job.pair.finetuned.total_bytes
    target = job.budget.target_bytes(checkpoint_bytes)
    for _ in range(6):
        settings, _ = allot(units, share, nominal)
        for (_, piece), chosen in zip(plan.lossy, settings, strict=True):
            piece.settings = chosen
        if target is None:
            return
        missing = target - archive_bytes(job, plan)
        if 0 <= missing < 0.001 * target or share >= 1.0 and missing > 0:
            return
        share += missing / sum(unit.raw_bytes for unit in units)
        if share <= 0:
            break
    smallest = _smallest_bytes(job, plan, units)
    if archive_bytes(job, plan) > 1.01 * target or share <= 0:
        raise refuse(job.budget, checkpoint_bytes, smallest, job.method)


def _smallest_bytes(job: Job, plan: Plan, units: list[Unit]) -> int:
    """Bytes of the archive with nothing kept but one value or component of each matrix."""
    held = [piece.settings for _, piece in plan.lossy]
    for (_, piece), unit in zip(plan.lossy, units, strict=True):
        o, i = unit.shape
        piece.settings = unit.codec.settings_for(unit.shape, (o + i) / (o * i), unit.spectrum)
    smallest = archive_bytes(job, plan)
    for (_, piece), settings in zip(plan.lossy, held, strict=True):
        piece.settings = settings
    return smallest


def part_specs(job: Job, plan: Plan) -> list[TensorSpec]:
    """All parts of the payload in order: name, dtype, shape."""
    specs: list[TensorSpec] = []
    for planned, tensor in zip(plan.tensors, draft_manifest(job, plan).tensors, strict=True):
        for ours, piece in zip(planned.pieces, tensor.pieces, strict=True):
            for part, dtype, shape in _piece_specs(job, planned, ours):
                specs.append((tensor.part_name(piece, part), dtype, shape))
    return specs


def _piece_specs(job: Job, tensor: PlannedTensor, piece: PlannedPiece) -> list[TensorSpec]:
    if piece.exact is not None:
        sizes: dict[str, int] = piece.exact["sizes"]
        return [(part, "U8", (size,)) for part, size in sorted(sizes.items())]
    if not piece.lossy:
        return []
    shape = (piece.stop - piece.start, tensor.pairing.tuned.matrix_shape[1])
    layout = job.codec(piece.codec).layout(shape, piece.settings)
    return [(n, DTYPE_NAMES[spec.dtype], spec.shape) for n, spec in sorted(layout.items())]


def archive_bytes(job: Job, plan: Plan) -> int:
    """Exact bytes of the archive that this plan gives (but for digits of error figures)."""
    _, frames = job.side_files
    return (
        len(draft_manifest(job, plan).to_text().encode())
        + payload_bytes(part_specs(job, plan))
        + sum(len(frame) for frame in frames.values())
    )


def _fixed_bytes(job: Job, plan: Plan) -> int:
    """Bytes that are spent whatever the lossy pieces get."""
    saved = [(piece, piece.settings) for _, piece in plan.lossy]
    for tensor, piece in plan.lossy:
        shape = (piece.stop - piece.start, tensor.pairing.tuned.matrix_shape[1])
        piece.settings = job.codec(piece.codec).settings_for(shape, 0.0, np.zeros(0))
    fixed = archive_bytes(job, plan)
    for piece, settings in saved:
        piece.settings = settings
    return fixed


def draft_manifest(job: Job, plan: Plan) -> Manifest:
    """The manifest of the plan as it stands; checksums not known yet are filled with zeros."""
    from deltafold.archive.manifest import PayloadFile

    pair = job.pair
    used = sorted({piece.codec for tensor in plan.tensors for piece in tensor.pieces})
    config: dict[str, dict[str, Any]] = {
        name: job.codec(name).config.to_json() if get(name).lossy else {} for name in used
    }
    files = {file: number for number, file in enumerate(pair.finetuned.shards)}
    removed = {name: pair_digest(job, name) for name in pair.removed}
    return Manifest(
        tool_version=__version__,
        method=job.method,
        seed=job.seed,
        budget={"kind": job.budget.kind, "asked": job.budget.asked} if job.budget else {},
        codecs={n: CodecEntry(version=get(n).version, config=config[n]) for n in used},
        base=_source(pair.base),
        finetuned=_source(pair.finetuned),
        removed=removed,
        payload=(PayloadFile(name="payload-00001-of-00001.safetensors", n_bytes=10**9),),
        files=job.side_files[0],
        tensors=tuple(
            Tensor(
                name=tensor.pairing.name,
                dtype=tensor.pairing.tuned.dtype,
                shape=tensor.pairing.tuned.shape,
                file=files[tensor.pairing.tuned.file],
                base=tensor.survey.base_digest,
                tuned=tensor.survey.tuned_digest,
                same_as=tensor.same_as,
                pieces=tuple(_manifest_piece(job, tensor, piece) for piece in tensor.pieces),
            )
            for tensor in plan.tensors
        ),
        totals={"checkpoint_bytes": pair.finetuned.total_bytes},
    )


def _manifest_piece(job: Job, tensor: PlannedTensor, piece: PlannedPiece) -> Piece:
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
        error=(piece.error if piece.error is not None else 0.1234) if piece.lossy else None,
    )


def _source(checkpoint: Any) -> Source:
    return Source(
        label=checkpoint.path.name if checkpoint.path.exists() else checkpoint.label,
        total_bytes=checkpoint.total_bytes,
        files=tuple(shard.name for shard in checkpoint.shards),
        metadata=checkpoint.metadata,
    )


def pair_digest(job: Job, name: str) -> str:
    """Digest of a tensor that only the base has (read once, kept)."""
    from deltafold.archive import TensorDigest
    from deltafold.checkpoint import tensor_bytes

    cache: dict[str, str] = job.__dict__.setdefault("_removed_digests", {})
    if name not in cache:
        info = job.pair.base.tensors[name]
        digest = TensorDigest(info.dtype, info.shape)
        for _, rows in job.pair.base.row_chunks(name, CHUNK_BYTES):
            digest.update(tensor_bytes(rows))
        cache[name] = digest.identity()
    return cache[name]


