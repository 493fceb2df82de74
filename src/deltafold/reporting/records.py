"""Records as typed values: what a report needs of each kind, checked when it is read.

Fields that a report does not use are ignored; a number that is missing, null or not finite is None.
A record that lacks what its kind must have is refused with the name of the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from deltafold.errors import DeltafoldError, nearest
from deltafold.record import RECORD_VERSION, Record, read_record


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Run(_Part):
    machine: dict[str, Any] = {}
    seconds: Number = None
    peak_memory_bytes: Number = None


# --- compress -----------------------------------------------------------------------------------


class SpectrumPoint(_Part):
    """The singular value number `index` of a delta."""

    index: int
    value: float


class TensorLine(_Part):
    """One tensor of the fine-tune and how the archive holds it. `bytes` are those stored."""

    name: str
    role: str = "other"
    block: int | None = None
    dtype: str
    elements: int
    codec: str
    bytes: int
    why: str | None = None
    relative_error: Number = None
    delta_norm: Number = None
    spectrum: list[SpectrumPoint] | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes in the fine-tuned checkpoint: BF16 -> 2 an element, F8_E4M3 -> 1, BOOL -> 1."""
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (int(bits.group()) // 8 if bits else 1)


class Budget(_Part):
    kind: str = "none"
    asked: Number = None
    got: Number = None


class Totals(_Part):
    checkpoint_bytes: int
    archive_bytes: int
    file_ratio: float
    nominal_ratio: Number = None
    payload_bytes: int | None = None
    manifest_bytes: int | None = None
    files_bytes: int = 0


class CompressRecord(_Run):
    kind: Literal["compress"]
    base: str = ""
    finetuned: str = ""
    archive: str
    method: str
    budget: Budget = Budget()
    totals: Totals
    tensors: list[TensorLine]

    @property
    def title(self) -> str:
        return Path(self.archive).name


# --- evaluate -----------------------------------------------------------------------------------


class Metric(_Part):
    """A measured mean over `n` samples."""

    value: Number = None
    stderr: Number = None
    n: int | None = None


class Metrics(_Part):
    perplexity: Metric | None = None
    kl_text: Metric | None = None
    agreement_text: Metric | None = None
    tasks: dict[str, dict[str, Metric]] = {}
    lm_eval: dict[str, dict[str, Metric]] = {}


class EvaluatedModel(_Part):
    label: str
    role: str = "candidate"
    archive_bytes: Number = None
    file_ratio: Number = None
    method: str | None = None
    metrics: Metrics


class EvaluateRecord(_Run):
    kind: Literal["evaluate"]
    models: list[EvaluatedModel]


# --- benchmark ----------------------------------------------------------------------------------


class Scores(_Part):
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


class BenchmarkRecord(_Run):
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


class FrontierRecord(_Run):
    """Methods x sizes x fine-tunes x seeds. `data`, `relative_delta_norm`: by fine-tune."""

    kind: Literal["frontier"]
    title: str = ""
    model: Any = None
    data: dict[str, Any] = {}
    relative_delta_norm: dict[str, Number] = {}
    rows: list[FrontierRow]
    reference: dict[str, dict[str, Scores]] = {}


# --- merge --------------------------------------------------------------------------------------


class MergedTensor(_Part):
    """What models brought to one tensor: lists run over models, `cosines` over their pairs.

    `norms` of deltas, `kept` after the sparsifier; `brought` = <merged, D_i> / <D_i, D_i>. Without
    `norms` the tensor holds integers, which are the base's.
    """

    name: str
    role: str = "other"
    block: int | None = None
    norms: list[float] | None = None
    kept: list[float] = []
    brought: list[Number] = []
    cosines: list[float] = []
    agreed: Number = None
    shared: int = 0
    norm: float = 0.0


class Tried(_Part):
    """A candidate of a search; `failed` says why it has no figures."""

    settings: dict[str, float]
    share_right: Number = None
    loss: Number = None
    failed: str | None = None
    kept: bool = False


class Search(_Part):
    criterion: str
    tried: list[Tried]


class MergeRecord(_Run):
    """`archive` are the totals of the archive, where the result is one."""

    kind: Literal["merge"]
    base: str = ""
    output: str
    output_bytes: int = 0
    recipe: dict[str, Any]
    models: list[str]
    notes: list[str] = []
    tensors: list[MergedTensor]
    search: Search | None = None
    scores: list[EvaluatedModel] = []
    archive: Totals | None = None

    @property
    def title(self) -> str:
        return Path(self.output).name

    @property
    def floats(self) -> list[MergedTensor]:
        """The tensors that were merged."""
        return [tensor for tensor in self.tensors if tensor.norms is not None]

    @property
    def short(self) -> list[str]:
        """The models' names: of their folders, or whole where two folders have one name."""
        names = [Path(label).name for label in self.models]
        pairs = zip(names, self.models, strict=True)
        return [name if names.count(name) == 1 else label for name, label in pairs]


# --- fold ---------------------------------------------------------------------------------------


class FoldMethod(_Part):
    name: str


class Removed(_Part):
    blocks: list[int]
    layer_share: float
    parameter_share: float


class FoldStep(_Part):
    """Blocks `gone`, in the place of which `kept` stands, with its share `ratio` of a sum."""

    gone: list[int]
    kept: int | None = None
    ratio: Number = None
    score: Number = None
    part: str | None = None


class Silenced(_Part):
    block: int
    part: str


class StateSimilarity(_Part):
    """The matrix over the states of the model as it was."""

    name: str
    values: list[list[float]]


class TextQuality(_Part):
    perplexity: Number = None
    kl: Number = None
    agreement: Number = None


class FoldRecord(_Run):
    """What a `fold` run did."""

    kind: Literal["fold"]
    output: str
    method: FoldMethod
    blocks: int
    removed: Removed
    kept: list[int]
    steps: list[FoldStep] = []
    silenced: list[Silenced] = []
    similarity: StateSimilarity | None = None
    quality: dict[str, TextQuality] = {}
    chosen: str | None = None

    @property
    def title(self) -> str:
        return Path(self.output).name


# --- restore, verify, plan ----------------------------------------------------------------------


class PlainRecord(_Run):
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
    | PlainRecord
)
KINDS: dict[str, type[KnownRecord]] = {
    "compress": CompressRecord,
    "evaluate": EvaluateRecord,
    "benchmark": BenchmarkRecord,
    "frontier": FrontierRecord,
    "merge": MergeRecord,
    "fold": FoldRecord,
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
