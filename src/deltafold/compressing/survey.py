"""First pass of `compress`: read every tensor of both checkpoints once.

For each tensor: digests, how much changed, norms. Tensors that must be exact (norms, biases, new
rows, small ones, constants such as those of masks), and those that look cheap to store exactly (few
values or rows changed), are encoded on the spot.

To an exact codec bits are bits. A method that approximates refuses NaN and infinity, unless both
sides have them at the same places: then they are constants, and the rows around them are exact.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from deltafold.archive import TensorDigest
from deltafold.checkpoint import DTYPES, tensor_bytes
from deltafold.codecs import exact_codec
from deltafold.codecs.base import Parts, Settings, parts_bytes
from deltafold.codecs.rows import changed_rows
from deltafold.coding.sums import squared, squared_distance
from deltafold.compressing.pair import Pair, Pairing
from deltafold.errors import NonFiniteError
from deltafold.lazy import torch
from deltafold.restoring.decode import reference_rows
from deltafold.running.workspace import Workspace, checksum

CHUNK_BYTES = 4 << 20
EXACT_ELEMENTS = 1 << 23  # an exact piece holds at most this many values
MOST = 1e12  # no weight is larger; squares and their sums then fit fp32
SPARSE_SHARE = 0.10  # below this share of changed values an exact patch is tried
_SAMPLED, _STRETCH = 1 << 15, 1 << 11  # values of a sample, and of each stretch of it
ROWS_SHARE = 0.50  # below this share of changed rows an embedding's rows are tried


@dataclass
class SpanSurvey:
    """What one span of rows looks like."""

    start: int
    stop: int
    in_base: bool
    changed_values: int = 0
    changed_rows: int = 0
    delta_squared: float = 0.0
    base_squared: float = 0.0
    lossy_allowed: bool = False
    why: str | None = None
    """Why it must be exact, if its values say so."""
    exact: list[dict[str, Any]] = field(default_factory=list)
    """Exact pieces, if encoded: rows, codec, settings, parts (checksums), n_bytes, file."""

    @property
    def equal(self) -> bool:
        return self.in_base and self.changed_values == 0

    @property
    def exact_bytes(self) -> int:
        return sum(piece["n_bytes"] for piece in self.exact)


@dataclass
class TensorSurvey:
    """What one tensor looks like; saved as JSON in the workspace."""

    name: str
    tuned_digest: str
    base_digest: str | None
    spans: list[SpanSurvey]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> TensorSurvey:
        return cls(**(raw | {"spans": [SpanSurvey(**span) for span in raw["spans"]]}))


def survey_tensor(
    pair: Pair, pairing: Pairing, index: int, workspace: Workspace, exact_method: str | None
) -> TensorSurvey:
    """Survey one tensor. `exact_method` is the exact codec asked for the whole model, or None."""
    spans = [
        SpanSurvey(
            s.start, s.stop, s.in_base, lossy_allowed=pairing.lossy_allowed(s), why=pairing.exact
        )
        for s in pairing.spans
    ]
    tuned_digest = TensorDigest(pairing.tuned.dtype, pairing.tuned.shape)
    base_digest = None
    if pairing.base is not None:
        base_digest = TensorDigest(pairing.base.dtype, pairing.base.shape)
    for span in spans:
        _read_span(pair, pairing, span, (tuned_digest, base_digest), exact_method is None)
    if pairing.base is not None and base_digest is not None:
        _digest_rest(pair, pairing, spans[-1].stop, base_digest)
    if pairing.found and _unrelated(spans):
        base_digest = None
        spans = [SpanSurvey(0, spans[-1].stop, False)]
        spans[0].changed_values = pairing.tuned.elements
        spans[0].changed_rows = spans[0].stop
    survey = TensorSurvey(
        pairing.name,
        tuned_digest.identity(),
        base_digest.identity() if base_digest else None,
        spans,
    )
    for number, span in enumerate(spans):
        if candidates := _exact_candidates(pairing, span, exact_method):
            span.exact = _encode_exact(
                pair, pairing, span, candidates, f"{index:06d}-{number}", workspace
            )
    return survey


def _read_span(
    pair: Pair,
    pairing: Pairing,
    span: SpanSurvey,
    digests: tuple[TensorDigest, TensorDigest | None],
    lossy: bool,
) -> None:
    tuned_digest, base_digest = digests
    columns = pairing.tuned.matrix_shape[1]
    step = max(1, CHUNK_BYTES // max(1, columns * pairing.tuned.itemsize))
    for start in range(span.start, span.stop, step):
        stop = min(span.stop, start + step)
        tuned = pair.finetuned.rows(pairing.name, start, stop)
        tuned_digest.update(tensor_bytes(tuned))
        if not span.in_base or base_digest is None:
            if lossy and not _within(tuned, math.inf):
                raise _not_finite(pairing.name, pair.finetuned.label)
            span.changed_values += tuned.numel()
            span.changed_rows += len(tuned)
            continue
        base = pair.base.rows(pairing.name, start, stop)
        base_digest.update(tensor_bytes(base))
        reference = base.to(tuned.dtype)
        if not (_within(tuned, MOST) and _within(base, MOST)):
            if lossy:
                _check_constant(pair, pairing.name, tuned, reference)
            span.lossy_allowed, span.why = False, "values too large to be approximated"
        rows = changed_rows(reference, tuned)
        span.changed_rows += int(rows.sum())
        if not bool(rows.any()):
            span.base_squared += squared(base)
            continue
        span.changed_values += int((_bits(reference) != _bits(tuned)).sum())
        span.base_squared += squared(base)
        if tuned.dtype.is_floating_point:
            span.delta_squared += squared_distance(tuned, base)


def _unrelated(spans: list[SpanSurvey]) -> bool:
    """Whether what a name seemed to point at is farther from the tensor than zeros are."""
    known = [span for span in spans if span.in_base]
    return sum(s.delta_squared for s in known) > sum(s.base_squared for s in known)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(signed[tensor.element_size()])


def _within(tensor: torch.Tensor, most: float) -> bool:
    """True if no value is NaN, infinite or larger than `most`."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    largest = float(wide.abs().max())  # the largest of values with NaN among them is NaN
    return math.isfinite(largest) and largest <= most


def _check_constant(pair: Pair, name: str, tuned: torch.Tensor, reference: torch.Tensor) -> None:
    """Refuse NaN and infinity that only one side has."""
    a, b = (x.float() if x.element_size() == 1 else x for x in (tuned, reference))
    differs = (a != b) & ~(a.isnan() & b.isnan())
    for side, values in ((pair.finetuned, a), (pair.base, b)):
        if bool((differs & ~values.isfinite()).any()):
            raise _not_finite(name, side.label)


def _not_finite(name: str, label: str) -> NonFiniteError:
    return NonFiniteError(
        f"Tensor {name} of {label} holds NaN or infinity; this checkpoint is broken, "
        "give a sound one, or store it as it is with -m lossless."
    )


def _digest_rest(pair: Pair, pairing: Pairing, start: int, digest: TensorDigest) -> None:
    """Rows that only the base has still belong to the base's identity."""
    assert pairing.base is not None
    n_rows = pairing.base.matrix_shape[0]
    if start < n_rows:
        digest.update(tensor_bytes(pair.base.rows(pairing.name, start, n_rows)))


def _exact_candidates(pairing: Pairing, span: SpanSurvey, exact_method: str | None) -> list[str]:
    """Exact codecs worth trying on a span; none if it is the delta codec's."""
    if span.equal or span.stop == span.start:
        return []
    values = (span.stop - span.start) * pairing.tuned.matrix_shape[1]
    sparse = span.in_base and span.changed_values <= SPARSE_SHARE * values
    few_rows = (
        span.in_base
        and pairing.vocabulary
        and span.changed_rows <= ROWS_SHARE * (span.stop - span.start)
    )
    if exact_method is None and span.lossy_allowed and not sparse and not few_rows:
        return []
    if exact_method not in (None, "lossless") and span.in_base:
        return [exact_method]
    return ["context", "lossless", *["sparse-patch"] * sparse, *["rows"] * few_rows]


def _encode_exact(
    pair: Pair,
    pairing: Pairing,
    span: SpanSurvey,
    candidates: list[str],
    stem: str,
    workspace: Workspace,
) -> list[dict[str, Any]]:
    """Encode a span exactly, in pieces of bounded size, each under its smallest candidate."""
    columns = pairing.tuned.matrix_shape[1]
    step = max(1, EXACT_ELEMENTS // max(1, columns))
    pieces = []
    for start in range(span.start, span.stop, step):
        stop = min(span.stop, start + step)
        tuned = pair.finetuned.rows(pairing.name, start, stop)
        reference = (
            reference_rows(pair.base, pairing.name, start, stop, DTYPES[pairing.tuned.dtype])
            if span.in_base
            else torch.zeros_like(tuned)
        )
        codec, settings, parts = _smallest(candidates, reference, tuned)
        file = f"exact/{stem}-{start}.safetensors"
        workspace.save_tensors(file, parts)
        pieces.append(
            {
                "rows": [start, stop],
                "codec": codec,
                "settings": settings,
                "parts": {name: checksum(part) for name, part in sorted(parts.items())},
                "sizes": {name: part.numel() for name, part in sorted(parts.items())},
                "n_bytes": sum(part.numel() for part in parts.values()),  # all parts are bytes
                "file": file,
            }
        )
    return pieces


def _smallest(
    candidates: list[str], reference: torch.Tensor, tuned: torch.Tensor
) -> tuple[str, Settings, Parts]:
    """The candidate that takes the fewest bytes, the earlier one of two alike.

    Of a large piece, one that is clearly larger on a sample is not tried on the whole.
    """
    first, *others = candidates
    best = (first, *exact_codec(first).encode(reference, tuned))
    for name in others:
        if _hopeless(name, reference, tuned, parts_bytes(best[2])):
            continue
        tried = (name, *exact_codec(name).encode(reference, tuned))
        best = min(best, tried, key=lambda item: parts_bytes(item[2]))
    return best


def _hopeless(name: str, reference: torch.Tensor, tuned: torch.Tensor, best_bytes: int) -> bool:
    """Whether a codec's bytes on stretches spread over the piece foretell far more than the best's."""
    count = tuned.numel()
    if count < 8 * _SAMPLED or name == "rows":  # rows need the matrix
        return False
    old, new = reference.reshape(-1), tuned.reshape(-1)
    starts = [
        n * (count - _STRETCH) // (_SAMPLED // _STRETCH - 1) for n in range(_SAMPLED // _STRETCH)
    ]
    sample = [torch.cat([side[at : at + _STRETCH] for at in starts]) for side in (old, new)]
    _, parts = exact_codec(name).encode(*sample)
    return parts_bytes(parts) * count > 1.15 * best_bytes * _SAMPLED
