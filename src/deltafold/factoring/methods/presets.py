"""The methods as a table: how the factors of a matrix are found, and how ranks are.

| method        | factors of                        | ranks                                  |
| svd           | one matrix, plain                 | the same share of every matrix         |
| lord          | one matrix, for its inputs        | the same share of every matrix         |
| bolaco        | one matrix, for its inputs        | five shares, searched                  |
| welore        | one matrix, plain                 | one threshold for scaled spectra       |
| lorc          | keys and values, for their inputs | by depth, from condition numbers       |
| basis-sharing | several blocks, for their inputs  | the same share of every group          |
| moe           | what experts differ by            | the same share of every set of experts |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltafold.errors import UsageError, nearest

Ranking = Literal["share", "search", "threshold", "depth"]


@dataclass(frozen=True)
class Method:
    """One way to factor a model. `roles` are those that are factored; None: all.

    `whitened` methods need text; `grouped` ones give several blocks one basis; with `mean` the
    experts of a block are stored as their mean and a delta for each, and nothing else is factored.
    """

    name: str
    paper: str
    ranking: Ranking = "share"
    whitened: bool = True
    grouped: bool = False
    mean: bool = False
    roles: frozenset[str] | None = None

    @property
    def looks(self) -> bool:
        """Whether it runs text through the model."""
        return self.whitened or self.ranking == "search"

    @classmethod
    def of(cls, name: str) -> Method:
        """The row of a name. Raises UsageError with the nearest names."""
        if name not in METHODS:
            raise UsageError(
                f"There is no method {name!r} to factor by; {nearest(name, list(METHODS))}"
            )
        return METHODS[name]


METHODS: dict[str, Method] = {
    each.name: each
    for each in (
        Method("svd", "Eckart and Young 1936", whitened=False),
        Method("lord", "arXiv 2309.14021"),
        Method("bolaco", "arXiv 2405.10616", ranking="search"),
        Method("welore", "arXiv 2407.11239", ranking="threshold", whitened=False),
        Method("lorc", "arXiv 2410.03111", ranking="depth", roles=frozenset({"k", "v"})),
        Method("basis-sharing", "arXiv 2410.03765", grouped=True),
        Method("moe", "arXiv 2411.01016", mean=True),
    )
}

SHARED_ROLES = frozenset({"q", "k", "v", "qkv", "gate", "up", "gate_up"})
"""Basis Sharing groups these; output and down projections stand alone (n = 1)."""
