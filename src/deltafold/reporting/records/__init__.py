"""Records as typed values: what a report needs of each kind, checked when it is read.

Fields that a report does not use are ignored; a number that is missing, null or not finite is None.
A record that lacks what its kind must have is refused with the name of the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError

from deltafold.errors import DeltafoldError, nearest
from deltafold.reporting.records.compress import CompressRecord
from deltafold.reporting.records.evaluate import EvaluateRecord
from deltafold.reporting.records.factor import FactorRecord
from deltafold.reporting.records.fold import FoldRecord
from deltafold.reporting.records.merge import MergeRecord
from deltafold.reporting.records.parts import Number, Part, Run
from deltafold.reporting.records.share import ShareRecord
from deltafold.running.record import RECORD_VERSION, Record, read_record

# --- benchmark ----------------------------------------------------------------------------------


class Scores(Part):
    """What can be said of one model. Shares lie between 0 and 1, KL is in nats a token."""

    exact_match: Number = None
    exact_match_stderr: Number = None
    accuracy: Number = None
    accuracy_stderr: Number = None
    kl: Number = None
    kl_stderr: Number = None
    agreement: Number = None
    agreement_stderr: Number = None
    perplexity: Number = None


class BenchmarkRow(Scores):
    finetune: str
    method: str
    asked_file_ratio: Number = None
    file_ratio: Number = None
    nominal_ratio: Number = None
    archive_bytes: Number = None
    compress_seconds: Number = None
    restore_seconds: Number = None
    peak_memory_bytes: Number = None


class BenchmarkRecord(Run):
    kind: Literal["benchmark"]
    title: str = ""
    model: Any = None
    data: Any = None
    rows: list[BenchmarkRow]
    reference: dict[str, dict[str, Scores]] = {}


# --- frontier -----------------------------------------------------------------------------------


class FrontierRow(BenchmarkRow):
    """One method, size, fine-tune and seed. Where the size cannot be met, `unmet` says why."""

    asked_file_ratio: float
    seed: int = 0
    unmet: str | None = None
    restore_peak_memory_bytes: Number = None


class FrontierRecord(Run):
    """Methods x sizes x fine-tunes x seeds. `data`, `relative_delta_norm`: by fine-tune."""

    kind: Literal["frontier"]
    title: str = ""
    model: Any = None
    data: dict[str, Any] = {}
    relative_delta_norm: dict[str, Number] = {}
    rows: list[FrontierRow]
    reference: dict[str, dict[str, Scores]] = {}


# --- restore, verify, plan ----------------------------------------------------------------------


class PlainRecord(Run):
    """A record of which a report shows the keys and values as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: Literal["restore", "verify", "plan"]


KnownRecord = (
    CompressRecord
    | EvaluateRecord
    | BenchmarkRecord
    | FrontierRecord
    | MergeRecord
    | FoldRecord
    | FactorRecord
    | ShareRecord
    | PlainRecord
)
KINDS: dict[str, type[KnownRecord]] = {
    "compress": CompressRecord,
    "evaluate": EvaluateRecord,
    "benchmark": BenchmarkRecord,
    "frontier": FrontierRecord,
    "merge": MergeRecord,
    "fold": FoldRecord,
    "factor": FactorRecord,
    "share": ShareRecord,
    "restore": PlainRecord,
    "verify": PlainRecord,
    "plan": PlainRecord,
}


def understood(record: Record | KnownRecord, source: str = "The record") -> KnownRecord:
    """The typed form of a record; one that is typed already comes back as it is.

    Raises DeltafoldError, naming `source`, for an unknown kind, a newer version, or a field that
    is missing or malformed.
    """
    if not isinstance(record, Mapping):
        return record
    kind, version = record.get("kind"), record.get("record_version", RECORD_VERSION)
    if kind not in KINDS:
        hint = nearest(str(kind), list(KINDS))
        raise DeltafoldError(f"{source} is of kind {kind!r}, which report cannot show; {hint}")
    if not isinstance(version, int) or version > RECORD_VERSION:
        raise DeltafoldError(f"{source} was written by a newer deltafold; upgrade to read it.")
    try:
        return KINDS[kind].model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DeltafoldError(
            f"{source} cannot be shown: field {field} ({first['msg'].lower()}); "
            f"run the {kind} command again."
        ) from None


def read_records(paths: list[Path]) -> list[KnownRecord]:
    """Read and check the records at these paths. Raises DeltafoldError naming the file."""
    return [understood(read_record(path), str(path)) for path in paths]
