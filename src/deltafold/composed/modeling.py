"""Linear layers composed of another layer's weight and of low-rank factors.

    y = W x + bias,   W = [own weight | another module's weight | nothing] + sum over parts of B A

Rows of another module's weight may be scaled, each by a number of the layer's own.

The rows of W are cut into parts (query, key and value of a fused projection), each with factors of
its own: A (rank, in) and B (rows, rank), or those of another module. What belongs to another module
is referred to, never owned: it is in memory and in the file once. `config.deltafold` says how each
layer is composed.

This file needs torch and transformers alone: it is also the `modeling_deltafold.py` that lies beside
the weights of such a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FORM_VERSION = 1


class LowRank(nn.Module):
    """B A for some rows of a matrix. A factor that is given belongs to another LowRank."""

    def __init__(self, rows: int, columns: int, rank: int, a: LowRank | None, b: LowRank | None):
        super().__init__()
        # In a tuple, so that the module is not registered: it is owned where it stands.
        self.lenders = (a, b)
        if a is None:
            self.a = nn.Parameter(torch.empty(rank, columns))
        if b is None:
            self.b = nn.Parameter(torch.empty(rows, rank))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (rows, rank), whoever owns them."""
        lender_a, lender_b = self.lenders
        return (
            self.a if lender_a is None else lender_a.factors()[0],
            self.b if lender_b is None else lender_b.factors()[1],
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(.., in) -> (.., rows)"""
        a, b = self.factors()
        a, b = a.to(x.device, x.dtype), b.to(x.device, x.dtype)
        return nn.functional.linear(nn.functional.linear(x, a), b)


class ComposedLinear(nn.Module):
    """A linear layer as its entry in the form says; see `deltafold.sharing.form`.

    `anchor` is the module whose weight is referred to. With `transposed` weights lie as (in, out),
    as those of GPT-2 do; factors never do.
    """

    def __init__(self, entry: dict[str, Any], anchor: nn.Module | None, parts: list[Any]):
        super().__init__()
        self.out_features, self.in_features = entry["shape"]
        self.transposed = bool(entry.get("transposed"))
        self.anchor: tuple[Any, ...] = () if anchor is None else (anchor,)
        shape = (self.in_features, self.out_features) if self.transposed else tuple(entry["shape"])
        if entry.get("weight") == "own":
            self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if entry.get("bias") else None
        self.scale = nn.Parameter(torch.empty(self.out_features)) if entry.get("scale") else None
        self.delta = nn.ModuleList(parts)

    def base_weight(self) -> torch.Tensor | None:
        """The weight that factors are added to, as it is stored; None if there is none."""
        if self.anchor:
            return self.anchor[0].weight
        return self._parameters.get("weight")

    def __getattr__(self, name: str) -> Any:
        """W in the layer's dtype to whoever reads `weight` instead of calling the layer, as Mamba does."""
        if name != "weight" or "weight" in self._parameters:
            return super().__getattr__(name)
        held = next(self.delta.parameters(), None)
        return self.dense_weight() if held is None else self.dense_weight().to(held.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(.., in) -> (.., out)"""
        weight, bias = self.base_weight(), None if self.scale is not None else self.bias
        if weight is None:
            y = x.new_zeros(*x.shape[:-1], self.out_features)
            y = y if bias is None else y + bias
        elif self.transposed:
            flat, weight = x.reshape(-1, self.in_features), weight.to(x.device)
            flat = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
            y = flat.view(*x.shape[:-1], self.out_features)
        else:
            y = nn.functional.linear(x, weight.to(x.device), bias)
        if self.scale is not None:
            y = y * self.scale.to(y.device, y.dtype)
            y = y if self.bias is None else y + self.bias
        if not self.delta:
            return y
        made = [part(x) for part in self.delta]
        return y + (made[0] if len(made) == 1 else torch.cat(made, dim=-1))

    def dense_weight(self) -> torch.Tensor:
        """W in fp32, stored as the original layer stores it."""
        weight = self.base_weight()
        shape = (self.out_features, self.in_features)
        device = next(iter(self.delta.parameters()), torch.zeros(0)).device
        if weight is None:
            dense = torch.zeros(shape, device=device)
        else:
            dense = (weight.T if self.transposed else weight).float().clone()
        if self.scale is not None:
            dense *= self.scale[:, None].to(dense)
        start = 0
        for part in self.delta:
            a, b = part.factors()  # type: ignore[operator]
            dense[start : start + len(b)] += (b.float() @ a.float()).to(dense.device)
            start += len(b)
        return (dense.T if self.transposed else dense).contiguous()


class StackedDelta(nn.Module):
    """Experts as mean + B A each: what stands for a parameter (count, out, in). Made when asked for."""

    def __init__(self, entry: dict[str, Any]):
        super().__init__()
        (rows, columns), count, rank = entry["shape"], entry["count"], entry["rank"]
        self.a = nn.Parameter(torch.empty(count, rank, columns))
        self.b = nn.Parameter(torch.empty(count, rows, rank))
        self.mean = nn.Parameter(torch.empty(rows, columns)) if entry.get("mean") else None

    def forward(self) -> torch.Tensor:
        """(count, out, in)"""
        made = torch.bmm(self.b, self.a)
        return made if self.mean is None else made + self.mean


def put_experts(model: nn.Module, name: str, entry: dict[str, Any]) -> None:
    """Let a parameter of stacked experts be computed from its factors; the module keeps its code."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    held = module.get_parameter(leaf)
    del module._parameters[leaf]
    made = StackedDelta(entry)
    for each in made.parameters():
        each.data = each.data.to(held.device, held.dtype)
    module.add_module(f"{leaf}_delta", made)
    kind = type(module)
    computed = property(lambda self: self._modules[f"{leaf}_delta"]())
    module.__class__ = type(kind.__name__, (kind,), {leaf: computed, "__module__": kind.__module__})


def compose(model: nn.Module, form: dict[str, Any]) -> dict[str, nn.Module]:
    """Put composed layers into a model, in place; the layers that stood there, by name.

    Entries may refer to modules anywhere in the model; a lender's entry stands before those that
    borrow from it. Parameters are made in the model's dtype, and empty: weights are loaded next.
    """
    if form.get("version") != FORM_VERSION:
        raise ValueError(
            f"config.deltafold is of version {form.get('version')}, and this code reads version "
            f"{FORM_VERSION}; use the deltafold that wrote it."
        )
    originals: dict[str, nn.Module] = {}
    for name, entry in form["linears"].items():
        original = model.get_submodule(name)
        made = _linear(model, entry)
        held = next(original.parameters())
        for each in made.parameters():
            each.data = each.data.to(held.device, held.dtype)
        put(model, name, made)
        originals[name] = original
    for name, entry in form.get("experts", {}).items():
        put_experts(model, name, entry)
    return originals


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _linear(model: nn.Module, entry: dict[str, Any]) -> ComposedLinear:
    columns = entry["shape"][1]
    parts = []
    for part in entry.get("parts", ()):
        lent: list[Any] = [part.get(f) and model.get_submodule(part[f]) for f in "ab"]
        parts.append(LowRank(part["rows"], columns, part["rank"], *lent))
    weight = entry.get("weight")
    anchor = None if weight in (None, "own") else model.get_submodule(weight)
    return ComposedLinear(entry, anchor, parts)


def composed_class(base: Any) -> Any:
    """The subclass of a transformers model class whose layers are as `config.deltafold` says."""

    class Composed(base):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            compose(self, config.deltafold)

        @classmethod
        def is_custom_code(cls) -> bool:
            """What the base's own code fills is filled as in the base: buffers that no file holds."""
            return False

    Composed.__name__ = Composed.__qualname__ = f"Deltafold{base.__name__}"
    return Composed
