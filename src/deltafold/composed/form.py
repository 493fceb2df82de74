"""How each linear layer of a model is composed: what stands under `deltafold` in its config.json.

    "linears": {
      "model.layers.3.mlp.up_proj": {
        "shape": [8192, 3072],                        out x in
        "weight": "model.layers.2.mlp.up_proj",       "own", another module's, or null: nothing
        "scale": true,                                rows of that weight are scaled, each by a number
        "bias": false, "transposed": false,           a bias is always own
        "parts": [{"rows": 8192, "rank": 100, "a": null, "b": null}]
      }, ...

A part is some rows with factors of rank r: A (r, in) and B (rows, r). Null: own. Else the name of the
factor's owner, such as "model.layers.2.mlp.up_proj.delta.0". Own tensors go by the names NAME.weight,
NAME.bias, NAME.scale, NAME.delta.N.a and NAME.delta.N.b; everything else in the file is the model's as it was.

    "experts": {
      "model.layers.3.mlp.experts.down_proj":          a parameter of stacked experts, count x out x in
        {"count": 8, "shape": [4096, 14336], "rank": 200, "mean": true},  ...

Of it stay NAME_delta.mean (out, in) if it has one, NAME_delta.a (count, rank, in) and NAME_delta.b
(count, out, rank): expert e is mean + B_e A_e.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltafold.errors import CheckpointError

KEY = "deltafold"
OWN = "own"
Shape = tuple[int, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Frozen):
    """Factors of some rows. `a`, `b`: None if own, else the module that owns the factor."""

    rows: int = Field(gt=0)
    rank: int = Field(gt=0)
    a: str | None = None
    b: str | None = None


class Linear(_Frozen):
    """One composed layer. `shape` is (out, in), whatever way its weight lies."""

    shape: tuple[int, int]
    weight: str | None = None
    scale: bool = False
    bias: bool = False
    transposed: bool = False
    parts: tuple[Part, ...] = ()

    @model_validator(mode="after")
    def _rows_add_up(self) -> Linear:
        if self.parts and sum(part.rows for part in self.parts) != self.shape[0]:
            raise ValueError(f"the rows of its parts do not add up to {self.shape[0]}")
        return self

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        """(name, shape) of what the layer owns, in the order in which it is written."""
        if self.weight == OWN:
            yield f"{name}.weight", self.shape[::-1] if self.transposed else self.shape
        if self.bias:
            yield f"{name}.bias", self.shape[:1]
        yield from self.factors(name)

    def factors(self, name: str) -> Iterator[tuple[str, Shape]]:
        """(name, shape) of the scale and the factors that the layer owns."""
        if self.scale:
            yield f"{name}.scale", self.shape[:1]
        for number, part in enumerate(self.parts):
            if part.a is None:
                yield f"{name}.delta.{number}.a", (part.rank, self.shape[1])
            if part.b is None:
                yield f"{name}.delta.{number}.b", (part.rows, part.rank)


class Experts(_Frozen):
    """Stacked experts of one parameter; `shape` is (out, in) of one of them."""

    count: int = Field(gt=0)
    shape: tuple[int, int]
    rank: int = Field(gt=0)
    mean: bool = False

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        """(name, shape) of what stands for the parameter, in the order in which it is written."""
        if self.mean:
            yield f"{name}_delta.mean", self.shape
        yield f"{name}_delta.a", (self.count, self.rank, self.shape[1])
        yield f"{name}_delta.b", (self.count, self.shape[0], self.rank)


class Form(_Frozen):
    """A whole model's composed layers, by module name; a lender stands before who borrows."""

    version: Literal[1] = 1
    method: dict[str, Any] = {}
    linears: dict[str, Linear] = {}
    experts: dict[str, Experts] = {}

    def to_json(self) -> dict[str, Any]:
        """What stands in the config."""
        return self.model_dump(mode="json")

    def owned(self) -> dict[str, Shape]:
        """Names and shapes of all tensors that composed layers own."""
        return {
            name: shape
            for path, linear in self.linears.items()
            for name, shape in linear.tensors(path)
        }

    def factors(self) -> dict[str, Shape]:
        """Names and shapes of all low-rank factors, and of scales."""
        return {
            name: shape
            for path, linear in self.linears.items()
            for name, shape in linear.factors(path)
        }


def read_form(config: dict[str, Any], label: str) -> Form | None:
    """The form in a config; None for an ordinary model. Raises CheckpointError."""
    if KEY not in config:
        return None
    try:
        return Form.model_validate(config[KEY])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or KEY
        raise CheckpointError(
            f"The entry {KEY!r} in the config of {label} is not valid ({where}: {first['msg']}); "
            "write the model again."
        ) from None
