"""The blocks of a model, told from the names and shapes of its tensors.

    model.layers.3.self_attn.q_proj.weight
    | prefix   | n | local name           |

The list of blocks is the outermost list in the names that is as long as the config says. All blocks
must hold the same tensors in the same shapes: only then can one take another's place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from deltafold.errors import MismatchError
from deltafold.names import role_of

Shape = tuple[int, ...]
Read = Callable[[str], torch.Tensor]
"""A tensor's local name -> the tensor."""

# The last matrix of a sub-layer, which writes into the hidden states.
_MLP_OUT = re.compile(
    r"(?:^|\.)(?:down_proj|w2|fc2|fc_out|dense_4h_to_h|mlp\.c_proj|output_linear)\.(?:weight|bias)$"
    r"|experts\.down_proj(?:_bias)?$"
)
_ATTENTION_OUT = re.compile(
    r"(?:attn|attention)\w*\.(?:o_proj|out_proj|c_proj|dense|wo)\.(?:weight|bias)$"
)

# What reads images or sound for a model of language.
_TOWER = re.compile(r"vision|visual|image|audio|speech|tower|qformer", re.I)


@dataclass(frozen=True)
class Layout:
    """Names of a model's blocks. `shapes` are those of one block's tensors, by local name."""

    prefix: str
    depth: int
    shapes: dict[str, Shape]
    outside: tuple[str, ...]
    parameters: int
    total: int

    def name(self, block: int, local: str) -> str:
        """The checkpoint's name of a block's tensor."""
        return f"{self.prefix}{block}.{local}"

    def split(self, name: str) -> tuple[int, str] | None:
        """(block, local name) of a checkpoint tensor; None outside of blocks."""
        found = _numbered(name, self.prefix)
        return found if found and found[0] < self.depth else None

    def mlp_outputs(self) -> list[str]:
        """Local names of what writes the MLP's result: down projections, and their biases."""
        return [local for local in self.shapes if _MLP_OUT.search(local)]

    def attention_outputs(self) -> list[str]:
        """Local names of what writes the attention's result."""
        return [local for local in self.shapes if _ATTENTION_OUT.search(local)]

    def part_parameters(self, part: str) -> int:
        """Parameters of the `attention` or the `mlp` (router and experts too) of one block."""
        return sum(
            math.prod(shape) for local, shape in self.shapes.items() if part_of(local) == part
        )


def is_output(local: str) -> bool:
    """True for what ends a sub-layer: down and output projections, and their biases."""
    return bool(_MLP_OUT.search(local) or _ATTENTION_OUT.search(local))


def is_transposed(shape: Shape, width: int) -> bool:
    """True where the matrix of a down projection lies as (in, out), as GPT-2's do."""
    return len(shape) > 1 and shape[-1] == width and shape[-2] != width


def part_of(local: str) -> str:
    """`attention`, `mlp` or `other` of a block's tensor; biases go with their matrices."""
    role = role_of(local)
    if role == "bias":
        role = role_of(local.removesuffix("bias") + "weight")
    if role in ("mlp", "expert", "router"):
        return "mlp"
    return "attention" if role == "attention" else "other"


def _numbered(name: str, prefix: str) -> tuple[int, str] | None:
    if not name.startswith(prefix):
        return None
    number, dot, local = name[len(prefix) :].partition(".")
    return (int(number), local) if dot and number.isdigit() else None


def find_layout(shapes: Mapping[str, Shape], depth: int, label: str = "the model") -> Layout:
    """The layout of a checkpoint's tensors, given how many blocks its config names.

    Raises MismatchError where there is no such list, or where blocks differ; then by name.
    """
    prefix = _prefix(shapes, depth, label)
    blocks: list[dict[str, Shape]] = [{} for _ in range(depth)]
    outside = []
    for name, shape in shapes.items():
        found = _numbered(name, prefix)
        if found is None:
            outside.append(name)
        elif found[0] >= depth:
            raise MismatchError(
                f"{label} holds {name}, but its config names {depth} blocks; such an additional "
                "block cannot be folded."
            )
        else:
            blocks[found[0]][found[1]] = tuple(shape)
    for number, block in enumerate(blocks):
        _check_alike(prefix, number, block, blocks[0], label)
    return Layout(
        prefix,
        depth,
        blocks[0],
        tuple(outside),
        sum(math.prod(shape) for shape in blocks[0].values()),
        sum(math.prod(shape) for shape in shapes.values()),
    )


def _prefix(shapes: Mapping[str, Shape], depth: int, label: str) -> str:
    """What stands before the number: the list with as many entries as there are blocks.

    Of several (a tower for images may be as deep, or deeper) one that is no longer, no tower by its
    name, and of those the one with the most parameters.
    """
    numbers: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdigit():
                prefix = ".".join(parts[:place]) + "." if place else ""
                numbers.setdefault(prefix, set()).add(int(part))
                sizes[prefix] = sizes.get(prefix, 0) + math.prod(shape)
                break  # what is numbered inside a block, such as experts, is no list of blocks
    fitting = [prefix for prefix, found in numbers.items() if set(range(depth)) <= found]
    if depth < 1 or not fitting:
        raise MismatchError(
            f"{label} holds no list of {depth} blocks in its tensor names; config and weights do "
            "not belong together, or this kind of model cannot be folded."
        )

    def fits(prefix: str) -> tuple[bool, bool, int]:
        return len(numbers[prefix]) == depth, not _TOWER.search(prefix), sizes[prefix]

    return max(fitting, key=fits)


def _check_alike(
    prefix: str, number: int, block: dict[str, Shape], first: dict[str, Shape], label: str
) -> None:
    for local in [*first, *block]:
        here, there = block.get(local), first.get(local)
        if here == there:
            continue
        name = f"{prefix}{number}.{local}"
        how = (
            f"is missing, unlike {prefix}0.{local}" if here is None
            else "has no counterpart in block 0" if there is None
            else f"is {list(here)}, but {list(there)} in block 0"
        )  # fmt: skip
        raise MismatchError(
            f"The blocks of {label} differ: {name} {how}; only alike blocks can be folded."
        )
