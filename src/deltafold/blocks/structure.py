"""The linear layers of a model's blocks, told from the model itself, which may be without weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltafold.calibration.usage import is_conv1d, is_linear, is_rewritten, tied_layers
from deltafold.errors import MismatchError
from deltafold.names import role_of

_GATE = re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate)$")
_WRITES = re.compile(r"(?:^|\.)(?:down_proj|o_proj|out_proj|c_proj|fc2|dense_4h_to_h|dense|wo|w2)$")
_HALVES = re.compile(r"(?:^|\.)gate_up_proj$")
_THIRDS = re.compile(r"(?:^|\.)(?:qkv_proj|c_attn|query_key_value)$")


@dataclass(frozen=True)
class Layer:
    """One linear layer of a block. `shape` is (out, in); `rows` those of the matrices fused in it."""

    local: str
    part: str
    shape: tuple[int, int]
    rows: tuple[int, ...]
    transposed: bool
    bias: bool

    @property
    def writes(self) -> bool:
        """True for what ends a sub-layer and writes into the hidden states."""
        return bool(_WRITES.search(self.local))

    @property
    def weights(self) -> int:
        """Numbers in its matrix."""
        return self.shape[0] * self.shape[1]

    def factor_cost(self, rank: int) -> int:
        """Numbers in factors of this rank of each matrix fused in it."""
        return sum(self.rank_of(rows, rank) * (rows + self.shape[1]) for rows in self.rows)

    def rank_of(self, rows: int, rank: int) -> int:
        """No more than a matrix of so many rows has."""
        return min(rank, rows, self.shape[1])


@dataclass(frozen=True)
class Structure:
    """A model's blocks by name, with their layers. `parameters` are all, tied ones once."""

    label: str
    model_type: str
    names: tuple[str, ...]
    layers: tuple[tuple[Layer, ...], ...]
    stacked: bool
    width: int
    parameters: int

    @property
    def depth(self) -> int:
        return len(self.names)

    def of(self, block: int, parts: Sequence[str]) -> list[Layer]:
        """A block's layers of these parts. Raises MismatchError where it has none."""
        found = [layer for layer in self.layers[block] if layer.part in parts]
        lacking = [part for part in parts if all(layer.part != part for layer in found)]
        if "mlp" in parts and self.stacked:
            raise MismatchError(
                f"{self.label} keeps its experts stacked in one parameter, which cannot refer to "
                "another block's; share the attention (--matrices attention)."
            )
        if lacking:
            raise MismatchError(
                f"Block {block} of {self.label} has no linear layers of the {lacking[0]} that are "
                "known by their names; choose other matrices."
            )
        return found

    def path(self, block: int, local: str) -> str:
        """A layer's module name."""
        return f"{self.names[block]}.{local}"


def read_structure(
    model: Any, blocks: Sequence[nn.Module], names: Sequence[str], label: str
) -> Structure:
    """The structure of a built model, which may lie on the meta device."""
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0)
    groups = getattr(text, "num_key_value_heads", None) or heads
    return Structure(
        label,
        str(model.config.model_type),
        tuple(names),
        tuple(
            tuple(_layers(model, block, name, heads, groups))
            for block, name in zip(blocks, names, strict=True)
        ),
        any(
            each.dim() == 3 and role_of(f"{name}.{local}") == "expert"
            for block, name in zip(blocks, names, strict=True)
            for local, each in block.named_parameters()
        ),
        int(text.hidden_size),
        sum(each.numel() for each in model.parameters()),
    )


def _layers(model: Any, block: nn.Module, name: str, heads: int, groups: int) -> list[Layer]:
    found, tied = [], tied_layers(model)
    for local, module in block.named_modules():
        if not (is_linear(module) or is_conv1d(module)) or _GATE.search(local):
            continue
        if f"{name}.{local}" in tied or is_rewritten(model, f"{name}.{local}"):
            continue
        role = role_of(f"{name}.{local}.weight")
        part = "attention" if role == "attention" else "mlp" if role in ("mlp", "expert") else None
        if part is None:
            continue
        transposed, weight = is_conv1d(module), module.get_parameter("weight")
        o, i = weight.shape[::-1] if transposed else weight.shape
        rows = _rows(local, int(o), heads, groups)
        found.append(
            Layer(local, part, (int(o), int(i)), rows, transposed, module.bias is not None)
        )
    return found


def _rows(local: str, o: int, heads: int, groups: int) -> tuple[int, ...]:
    """Rows of the matrices that are fused in one: gate and up; query, key and value."""
    if _HALVES.search(local) and o % 2 == 0:
        return (o // 2, o // 2)
    if _THIRDS.search(local) and heads and o % (heads + 2 * groups) == 0:
        head = o // (heads + 2 * groups)
        return (heads * head, groups * head, groups * head)
    return (o,)
