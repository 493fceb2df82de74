"""The record of a merge, as a report needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from deltafold.reporting.records.compress import Totals
from deltafold.reporting.records.evaluate import EvaluatedModel
from deltafold.reporting.records.parts import Number, Part, Run


class MergedTensor(Part):
    """What models contributed to one tensor: lists run over models, `cosines` over their pairs.

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


class Tried(Part):
    """A candidate of a search; `failed` says why it has no figures."""

    settings: dict[str, float]
    share_right: Number = None
    loss: Number = None
    failed: str | None = None
    kept: bool = False


class Search(Part):
    criterion: str
    tried: list[Tried]


class MergeRecord(Run):
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
