"""The blocks of a checkpoint and their units, from its config and headers."""

from __future__ import annotations

from typing import Any

from deltafold.blocks.configs import depth_of, text_config
from deltafold.blocks.layout import Layout, find_layout
from deltafold.blocks.units import Heads, Units, find_units
from deltafold.checkpoint import DTYPES, Checkpoint
from deltafold.errors import CheckpointError, MismatchError


def read_layout(checkpoint: Checkpoint) -> tuple[Layout, list[Units]]:
    """The blocks of a checkpoint, and their units. Raises CheckpointError, MismatchError."""
    config = checkpoint.config()
    if not config:
        raise CheckpointError(
            f"{checkpoint.label} holds no config.json, which says how many blocks there are; give a "
            "folder that has one."
        )
    if "quantization_config" in config:
        raise MismatchError(
            f"{checkpoint.label} holds quantised weights; fold it unquantised, then quantise."
        )
    shapes = {name: tuple(info.shape) for name, info in checkpoint.own_tensors.items()}
    layout = find_layout(shapes, depth_of(config, checkpoint.label), checkpoint.label)
    _check_dtypes(checkpoint, layout)
    return layout, find_units(layout, _heads(text_config(config)))


def _check_dtypes(checkpoint: Checkpoint, layout: Layout) -> None:
    for name in (layout.name(0, local) for local in layout.shapes):
        dtype = DTYPES[checkpoint.tensors[name].dtype]
        if dtype.is_floating_point and dtype.itemsize < 2:
            raise MismatchError(f"{name} is {dtype}; fold the model unquantised, then quantise.")


def _heads(config: dict[str, Any]) -> Heads:
    """What the config says of heads; zeros where it is silent, and no head groups are known."""

    def first(*names: str) -> int:
        found = (config.get(name) for name in names)
        return next((each for each in found if isinstance(each, int)), 0)

    queries = first("num_attention_heads", "n_head", "num_heads")
    groups = first("num_key_value_heads") or queries
    return Heads(queries, groups, first("hidden_size", "n_embd", "d_model"))
