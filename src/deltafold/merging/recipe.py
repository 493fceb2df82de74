"""What is to be merged, how, and with which numbers for which tensor.

A number may be one for all tensors, a list that runs over the blocks (a gradient: its entries lie at
equal distances from the first block to the last, straight lines between them), or a table:

    0.7      [0.2, 0.8]      {"attention": 0.4, "mlp": [0, 1], "blocks 0-5": 0.1, "default": 0.5}

In a table ranges of blocks come first, then roles (`names.py`), then `default`. A list of conditions
goes by names instead: the first counts whose filter is part of the tensor's name, or that has none.

    [{"filter": "q_proj", "value": 0.4}, {"value": 0.5}]
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from deltafold.errors import UsageError, nearest
from deltafold.merging.methods.consensus import CONSENSUS
from deltafold.merging.methods.presets import PRESETS
from deltafold.merging.methods.sparsify import SPARSIFIERS
from deltafold.names import ROLES, block_of, role_of

Value = Any  # float | list[float] | dict[str, Value]
NUMBERS = ("epsilon", "gamma", "threshold", "agree", "normalize", "sign_of_zero", "beta", "c")
_RANGE = re.compile(r"blocks? (\d+)(?:-(\d+))?$")


@dataclass(frozen=True)
class Model:
    """One fine-tune: a path, its weight, and the density its delta is sparsified to."""

    path: str
    weight: Value = 1.0
    density: Value | None = None  # None: the method's


@dataclass(frozen=True)
class Recipe:
    """A whole merge. Raises UsageError, with every mistake, when made."""

    models: tuple[Model, ...]
    method: str = "ties"
    sparsifier: str | None = None  # None: the method's
    consensus: str | None = None
    scale: Value | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    tokenizer: str | None = None  # base (None), union, or the path of a model
    blocks: int | None = None  # how deep the models must be, where a file says so

    def __post_init__(self) -> None:
        if mistakes := list(self._mistakes()):
            raise UsageError(" ".join(mistakes))

    def _mistakes(self) -> list[str]:
        found = []
        if self.method not in PRESETS:
            return [
                f"There is no merge method {self.method!r}; {nearest(self.method, list(PRESETS))}"
            ]
        for kind, name, table in (
            ("sparsifier", self.sparsifier, SPARSIFIERS),
            ("consensus", self.consensus, CONSENSUS),
        ):
            if name is not None and name not in table:
                found.append(f"There is no {kind} {name!r}; {nearest(name, list(table))}")
        if not self.models:
            found.append("Name at least one fine-tune to merge.")
        if self.rules[1] == "slerp" and len(self.models) != 2:
            found.append(f"slerp takes two models, not {len(self.models)}.")
        for name, value in self.numbers.items():
            if name not in NUMBERS:
                found.append(
                    f"No merge method has a number {name!r}; {nearest(name, list(NUMBERS))}"
                )
            elif not isinstance(value, int | float):
                found.append(f"{name} must be a number, not {value!r}.")
        for model in self.models:
            found += _wrong(f"weight of {model.path}", model.weight, -math.inf, math.inf)
            if model.density is not None:
                found += _wrong(f"density of {model.path}", model.density, 0.0, 1.0)
        if self.scale is not None:
            found += _wrong("scale", self.scale, -math.inf, math.inf)
        return found

    @property
    def rules(self) -> tuple[str, str]:
        """(sparsifier, consensus)."""
        preset = PRESETS[self.method]
        return self.sparsifier or preset.sparsifier, self.consensus or preset.consensus

    def all_numbers(self) -> dict[str, float]:
        """All numbers of the rules."""
        return PRESETS[self.method].numbers | self.numbers

    def weight_at(self, model: Model, name: str, n_blocks: int) -> float:
        return value_at(model.weight, name, n_blocks)

    def density_at(self, model: Model, name: str, n_blocks: int) -> float:
        usual = PRESETS[self.method].density
        if self.sparsifier is not None and self.sparsifier != PRESETS[self.method].sparsifier:
            usual = 1.0 if self.sparsifier == "none" else 0.5
        return usual if model.density is None else value_at(model.density, name, n_blocks)

    def scale_at(self, name: str, n_blocks: int) -> float:
        if self.scale is None:
            return PRESETS[self.method].scale
        return value_at(self.scale, name, n_blocks)

    def to_json(self) -> dict[str, Any]:
        """For records and journals."""
        sparsifier, consensus = self.rules
        return {
            "method": self.method,
            "sparsifier": sparsifier,
            "consensus": consensus,
            "scale": PRESETS[self.method].scale if self.scale is None else self.scale,
            "numbers": self.all_numbers(),
            "tokenizer": self.tokenizer,
            "models": [
                {"path": m.path, "weight": m.weight, "density": m.density} for m in self.models
            ],
        }


def value_at(value: Value, name: str, n_blocks: int) -> float:
    """The number of one tensor.

    >>> value_at([0.0, 1.0], "model.layers.2.mlp.up_proj.weight", 5)
    0.5
    >>> value_at({"mlp": 0.2, "default": 1}, "model.layers.2.mlp.up_proj.weight", 5)
    0.2
    """
    if isinstance(value, dict):
        block = block_of(name)
        for key, each in value.items():
            found = _RANGE.match(key)
            if found and block is not None:
                first = int(found[1])
                if first <= block <= int(found[2] or first):
                    return value_at(each, name, n_blocks)
        return value_at(value.get(role_of(name), value.get("default")), name, n_blocks)
    if _is_conditions(value):
        condition = next(each for each in value if each.get("filter", "") in name)
        return value_at(condition["value"], name, n_blocks)
    if isinstance(value, list):
        return _gradient(value, name, n_blocks)
    return float(value)


def _is_conditions(value: Value) -> bool:
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def _gradient(values: list[float], name: str, n_blocks: int) -> float:
    """Outside of blocks: the first entry before them (embedding), the last behind them."""
    block = block_of(name)
    if block is None:
        return float(values[0] if role_of(name) == "embedding" else values[-1])
    place = block / max(1, n_blocks - 1) * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (place - low) * (values[high] - values[low]))


def _wrong(what: str, value: Value, low: float, high: float) -> list[str]:
    if isinstance(value, dict):
        found = [
            f"{what}: {key!r} is neither a role ({', '.join(ROLES)}), nor 'blocks 0-5', nor default."
            for key in value
            if key not in ROLES and key != "default" and not _RANGE.match(str(key))
        ]
        if "default" not in value:
            found.append(f"{what}: a table needs a default.")
        return found + [
            line
            for key, each in value.items()
            for line in _wrong(f"{what} ({key})", each, low, high)
        ]
    if _is_conditions(value):
        if not all(_is_condition(each) for each in value) or "filter" in value[-1]:
            return [f"{what}: conditions have a filter and a value each, the last only a value."]
        return [line for each in value for line in _wrong(what, each["value"], low, high)]
    if isinstance(value, list):
        if not value:
            return [f"{what}: a gradient needs numbers."]
        return [line for each in value for line in _wrong(what, each, low, high)]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return [f"{what} must be a number between {low:g} and {high:g}, not {value!r}."]
    return [] if math.isfinite(value) else [f"{what} must be a finite number."]


def _is_condition(each: Any) -> bool:
    filters = [each.get("filter", "")] if isinstance(each, dict) else [None]
    return isinstance(filters[0], str) and "value" in each and each.keys() <= {"filter", "value"}
