"""Named methods: rows of similarity x selection x rule."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

from deltafold.errors import DeltafoldWarning, UsageError, nearest
from deltafold.folding.methods.rules import RULES, Rule
from deltafold.folding.methods.selection import SELECTIONS, Chooser
from deltafold.folding.methods.similarity import ABSENCES, SIMILARITIES


@dataclass(frozen=True)
class Preset:
    """A method. `ratio` says where a kept block's share of a weighted sum comes from.

    `similarity`: the value for the pair. `reference`: what MKA's program takes.
    `closed_form` is the healing where none is asked for: `none`, `cut` or `through`; `protect` are
    the blocks left alone where nothing is said of them, from the last if negative.
    """

    similarity: str
    selection: str
    rule: str
    ratio: str = "similarity"
    paper: str = ""
    closed_form: str = "none"
    protect: tuple[int, ...] = ()


AUTO = "auto"
PRESETS: dict[str, Preset] = {
    AUTO: Preset("cosine", "lowest", "drop", closed_form="through"),
    "mka": Preset("npib", "adjacent-pairs", "average", paper="2406.16330", protect=(0, -1)),
    "mka-reference": Preset(
        "npib-reference", "last-pair", "average-matrices", "reference", "2406.16330"
    ),
    "shortgpt": Preset("cosine", "lowest", "drop", paper="2403.03853"),
    "angular": Preset("angular", "contiguous", "drop", paper="2403.17887"),
    "laco": Preset("cosine", "top-down", "collapse", paper="2402.11187"),
    "laco-reference": Preset("cosine", "top-down", "telescope", paper="2402.11187"),
    "jointdrop": Preset("cosine", "joint", "drop", paper="2406.15786"),
    "sleb": Preset("perplexity", "greedy", "drop", paper="2402.09025"),
    "reverse": Preset("cosine", "last", "drop"),
    "random": Preset("cosine", "random", "drop"),
    "replaceme": Preset("cosine", "contiguous", "replace-me", paper="2505.02819"),
    "replaceme-cosine": Preset("cosine", "contiguous", "replace-me-cosine", paper="2505.02819"),
    "linearpatch-scale": Preset("cosine", "contiguous", "scale", paper="2505.24680"),
    "come": Preset("angular", "weakest-pair", "concatenate", paper="2510.15304"),
}
METHODS = tuple(PRESETS)
OLD_NAMES = {"linearpatch": "linearpatch-scale", "linear-patch": "scale"}
"""Rows that have another name now, which says what they do."""


@dataclass(frozen=True)
class Method:
    """A method with what was changed of it. Raises UsageError for what is not known."""

    name: str
    preset: Preset

    @classmethod
    def of(
        cls,
        name: str,
        similarity: str | None = None,
        selection: str | None = None,
        rule: str | None = None,
    ) -> Method:
        known = list(METHODS)
        name, rule = _renamed(name), rule and _renamed(rule)
        if name not in known:
            raise UsageError(f"There is no method {name!r}; {nearest(name, known)}")
        tables = (
            ("similarity", similarity, list(SIMILARITIES)),
            ("selection", selection, list(SELECTIONS)),
            ("rule", rule, list(RULES)),
        )
        changed: dict[str, Any] = {}
        for field, value, rows in tables:
            if value is None:
                continue
            if value not in rows:
                raise UsageError(f"There is no {field} {value!r}; {nearest(value, rows)}")
            changed[field] = value
        made = cls(name, replace(PRESETS[name], **changed))
        made.check()
        return made

    @property
    def chooser(self) -> Chooser:
        return SELECTIONS[self.preset.selection]

    @property
    def rule(self) -> Rule:
        return RULES[self.preset.rule]

    @property
    def uses_matrix(self) -> bool:
        """True where a similarity matrix is asked for."""
        by_matrix = self.chooser.needs == "matrix" or (
            self.chooser.needs == "absence" and self.preset.similarity not in ABSENCES
        )
        return by_matrix or (self.preset.ratio == "reference" and self.rule.merges)

    def to_json(self) -> dict[str, Any]:
        """Name, rows, and where ratios come from; for the record."""
        preset = self.preset
        return {
            "name": self.name,
            "similarity": preset.similarity,
            "selection": preset.selection,
            "rule": preset.rule,
            "ratio": preset.ratio,
            "merges": self.rule.merges,
        }

    def check(self) -> None:
        """Raises UsageError for rows that do not go together."""
        preset = self.preset
        if self.chooser.needs == "matrix" and preset.similarity in ABSENCES:
            raise UsageError(
                f"The selection {preset.selection} compares states, and {preset.similarity} does not; "
                "take the selection greedy, or another similarity."
            )
        if self.chooser.removes == "part" and preset.rule != "drop":
            raise UsageError(
                f"Attention or MLP can only be dropped alone, so the rule {preset.rule} does not suit "
                f"the selection {preset.selection}; take the rule drop."
            )
        if self.chooser.needs == "closeness" and not self.rule.merges:
            raise UsageError(
                f"The selection {preset.selection} folds blocks together; take the rule collapse or average."
            )


def _renamed(name: str) -> str:
    """A row's name as it is now, with a word where that is another."""
    if name not in OLD_NAMES:
        return name
    warnings.warn(
        f"{name} is called {OLD_NAMES[name]}: LinearPatch multiplies the hidden states at the cut "
        "by a matrix, for which an ordinary model has no place; it has one for the matrix's mean scale.",
        DeltafoldWarning,
        stacklevel=3,
    )
    return OLD_NAMES[name]
