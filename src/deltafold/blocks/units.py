"""The interchangeable units of a block: neurons of its MLP, head groups of its attention.

Units may be put in another order without changing what a block computes, as long as every tensor
that knows them follows: for a neuron a row of the gate and up projections and a column of the down
projection; for a head group the rows of its query heads, of its key and of its value, and the
columns of the output projection.

    q_proj   | group 0: heads 0 1 | group 1: heads 2 3 |        k_proj, v_proj  | 0 | 1 |
    fused    | all queries | all keys | all values |            each part in groups
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from deltafold.blocks.layout import Layout, Read, is_transposed

_IN = re.compile(
    r"(?:^|[._])(?:gate_proj|up_proj|gate_up_proj|w1|w3|c_fc|fc1|fc_in|dense_h_to_4h|input_linear)"
    r"(?:\.(?:weight|bias)|_bias)?$"
)
_QUERY = re.compile(r"(?:^|\.)(?:q_proj|query)\.(?:weight|bias)$")
_KEY_VALUE = re.compile(r"(?:^|\.)(?:[kv]_proj|key|value)\.(?:weight|bias)$")
_FUSED = re.compile(r"(?:^|\.)(?:qkv_proj|c_attn)\.(?:weight|bias)$")
_EXPERT = re.compile(r"^(.*experts\.\d+|.*shared_experts?)\.")


@dataclass(frozen=True)
class Slice:
    """Entries [start + u * each, start + (u + 1) * each) of `axis` belong to unit u."""

    local: str
    axis: int
    start: int
    each: int

    def parts(self, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """The entries (count, values) of units in a tensor of any shape: one row a unit."""
        held = tensor.narrow(self.axis, self.start, count * self.each).movedim(self.axis, 0)
        return held.reshape(count, -1)

    def put(self, tensor: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor with its units' entries taken from `parts` (count, values)."""
        out = tensor.movedim(self.axis, 0).clone()
        length = parts.shape[0] * self.each
        out[self.start : self.start + length] = parts.reshape(length, *out.shape[1:])
        return out.movedim(0, self.axis).contiguous()


@dataclass(frozen=True)
class Units:
    """One kind of unit: how many there are, and where each tensor holds them.

    `outputs` are the slices of what the units write, the others are of what they read.
    """

    name: str
    count: int
    slices: tuple[Slice, ...]
    outputs: tuple[Slice, ...]

    @property
    def all_slices(self) -> tuple[Slice, ...]:
        return (*self.slices, *self.outputs)


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, and width of the model, from its config."""

    queries: int
    groups: int
    width: int


def find_units(layout: Layout, heads: Heads) -> list[Units]:
    """All units of a block. Tensors that fit no pattern are in none, and are left as they are."""
    found = _neurons(layout, heads.width)
    group = _head_groups(layout, heads)
    return [*found, *([group] if group else [])]


def _neurons(layout: Layout, width: int) -> list[Units]:
    """Neurons of the MLP; each expert, and a shared one, has neurons of its own."""
    members: dict[str, tuple[list[str], list[str]]] = {}
    outputs = set(layout.mlp_outputs())
    for local, shape in layout.shapes.items():
        if not (local in outputs or _IN.search(local)) or len(shape) > 2:
            continue
        expert = _EXPERT.match(local)
        into, out = members.setdefault(expert.group(1) if expert else "mlp", ([], []))
        (out if local in outputs else into).append(local)
    made = []
    for name, (into, out) in members.items():
        matrices = [local for local in out if len(layout.shapes[local]) == 2]
        if not matrices or not into:
            continue
        axis = 0 if is_transposed(layout.shapes[matrices[0]], width) else 1
        count = layout.shapes[matrices[0]][axis]
        slices = [each for local in into for each in _neuron_slices(layout, local, count, axis)]
        made.append(Units(name, count, tuple(slices), (Slice(matrices[0], axis, 0, 1),)))
    return made


def _neuron_slices(layout: Layout, local: str, count: int, out_axis: int) -> list[Slice]:
    """Gate and up may be fused: then the axis is twice as long. Biases have one axis."""
    shape = layout.shapes[local]
    axis = 0 if len(shape) == 1 else 1 - out_axis
    return [Slice(local, axis, start, 1) for start in range(0, shape[axis], count)]


def _head_groups(layout: Layout, heads: Heads) -> Units | None:
    outs = [local for local in layout.attention_outputs() if len(layout.shapes[local]) == 2]
    if not outs or not heads.groups or heads.queries % heads.groups:
        return None
    queries, fused = _matching(layout, _QUERY), _matching(layout, _FUSED)
    out_axis = 0 if fused and _reads_by_column(layout, fused, heads.width) else 1
    each = layout.shapes[outs[0]][out_axis] // heads.groups
    head = each * heads.groups // heads.queries
    slices: list[Slice] = []
    for local in queries:
        slices.append(Slice(local, 0, 0, each))
    for local in _matching(layout, _KEY_VALUE):
        slices.append(Slice(local, 0, 0, layout.shapes[local][0] // heads.groups))
    for local in fused:
        axis = 0 if len(layout.shapes[local]) == 1 else 1 - out_axis
        starts = (0, each * heads.groups, (each + head) * heads.groups)
        slices += [
            Slice(local, axis, at, size)
            for at, size in zip(starts, (each, head, head), strict=True)
        ]
    if not slices:
        return None
    return Units("heads", heads.groups, tuple(slices), (Slice(outs[0], out_axis, 0, each),))


def _matching(layout: Layout, pattern: re.Pattern[str]) -> list[str]:
    return [local for local in layout.shapes if pattern.search(local)]


def _reads_by_column(layout: Layout, locals_: Sequence[str], width: int) -> bool:
    """True where matrices lie as (in, out), as those of GPT-2 do."""
    shapes = [layout.shapes[local] for local in locals_ if len(layout.shapes[local]) == 2]
    return bool(shapes) and shapes[0][0] == width and shapes[0][1] != width


def rearranged(
    units: Sequence[Units], chosen: Mapping[str, torch.Tensor], local: str, tensor: torch.Tensor
) -> torch.Tensor:
    """The tensor, any shape, with unit u of each kind replaced by its unit `chosen[kind][u]`."""
    for kind in units:
        for each in kind.all_slices:
            if each.local == local:
                parts = each.parts(tensor, kind.count)
                tensor = each.put(tensor, parts[chosen[kind.name]])
    return tensor


def features(kind: Units, read: Read) -> torch.Tensor:
    """What describes each unit: all its weights (count, values), in fp32."""
    return torch.cat([s.parts(read(s.local).float(), kind.count) for s in kind.all_slices], dim=1)
