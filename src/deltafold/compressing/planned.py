"""A plan: what each piece of each tensor is stored by, first decided from the survey alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deltafold.codecs.base import Settings, Shape, Spectrum
from deltafold.compressing.job import CompressJob
from deltafold.compressing.pair import DeltaRows, Pairing, Span
from deltafold.compressing.survey import SpanSurvey, TensorSurvey


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
    folder: str = "lossy"  # there; `distilled` once its parts are trained
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
    restored: str | None = None  # checksum of what it decodes to, once that is known

    @property
    def lossy(self) -> bool:
        """True if some of it is approximated."""
        return any(piece.lossy for piece in self.pieces)

    def shape(self, piece: PlannedPiece) -> Shape:
        """Rows and columns of one of its pieces."""
        return (piece.stop - piece.start, self.pairing.tuned.matrix_shape[1])

    def delta(self, job: CompressJob, piece: PlannedPiece) -> DeltaRows:
        """The delta of a lossy piece."""
        fisher = job.fisher(self.pairing.name, piece.start, piece.stop)
        return DeltaRows(job.pair, self.pairing, Span(piece.start, piece.stop, True), fisher)

    def span(self, piece: PlannedPiece) -> SpanSurvey:
        """The survey of the span that a lossy piece covers."""
        return next(s for s in self.survey.spans if (s.start, s.stop) == (piece.start, piece.stop))


@dataclass
class Plan:
    tensors: list[PlannedTensor]

    @property
    def lossy(self) -> list[tuple[PlannedTensor, PlannedPiece]]:
        return [(t, p) for t in self.tensors for p in t.pieces if p.lossy]


def decide(job: CompressJob, surveys: list[TensorSurvey]) -> Plan:
    """First decision, before the budget: equal, twin, exact because it must be, or lossy."""
    owners = _owners(surveys)
    tensors = []
    for index, (pairing, survey) in enumerate(zip(job.pair.pairings, surveys, strict=True)):
        equal = all(span.equal for span in survey.spans)
        twin = owners[survey.tuned_digest]
        if not equal and twin != pairing.name:
            tensors.append(PlannedTensor(pairing, survey, [], same_as=twin))
            continue
        pieces: list[PlannedPiece] = []
        for number, span in enumerate(survey.spans):
            pieces += _pieces(job, span, f"{index:06d}-{number}", pairing.why)
        tensors.append(PlannedTensor(pairing, survey, _joined(pieces)))
    return Plan(tensors)


def _owners(surveys: list[TensorSurvey]) -> dict[str, str]:
    """Which tensor stores the values of a digest: the first that has a counterpart, or the first."""
    owners: dict[str, str] = {}
    for survey in [s for s in surveys if s.base_digest] + surveys:
        owners.setdefault(survey.tuned_digest, survey.name)
    return owners


def _pieces(job: CompressJob, span: SpanSurvey, stem: str, why: str) -> list[PlannedPiece]:
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
    return exact_pieces(span, span.why if span.in_base else why)


def exact_pieces(span: SpanSurvey, why: str | None) -> list[PlannedPiece]:
    return [
        PlannedPiece(
            piece["codec"],
            piece["rows"][0],
            piece["rows"][1],
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
