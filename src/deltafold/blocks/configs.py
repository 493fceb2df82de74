"""The config of a model with fewer blocks: everything that is said of each block follows.

num_hidden_layers  5 -> 3
layer_types        [s, s, s, s, full]   kept 0 1 4 ->   [s, s, full]
max_window_layers  3                    kept 0 1 4 ->   2       the first blocks, counted
mlp_only_layers    [1, 4]               kept 0 1 4 ->   [1, 2]  numbers of blocks
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from deltafold.errors import MismatchError

Config = dict[str, Any]

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNTS_FIRST = ("max_window_layers", "first_k_dense_replace")
_NUMBERS = ("_layers", "_layer_ids", "_layer_idx", "_layers_idx", "_indices", "_idxs")
_NO_LIST_OF_BLOCKS = ("token_id", "token_ids", "architectures", "torch_dtype", "dtype")


def text_config(config: Config) -> Config:
    """The part that speaks of the text model: some configs hold it inside."""
    for name in ("text_config", "llm_config", "language_config"):
        inside = config.get(name)
        if isinstance(inside, dict) and any(key in inside for key in DEPTHS):
            return inside
    return config


def depth_of(config: Config, label: str = "the model") -> int:
    """Number of blocks. Raises MismatchError where the config does not say it."""
    inside = text_config(config)
    for name in DEPTHS:
        if isinstance(inside.get(name), int):
            return int(inside[name])
    raise MismatchError(
        f"The config of {label} does not say how many blocks it has ({', '.join(DEPTHS)}); "
        "give a whole Hugging Face folder."
    )


def shortened(config: Config, kept: Sequence[int]) -> Config:
    """The config with only the blocks `kept`, ascending numbers of the old ones."""
    made = deepcopy(config)
    inside = text_config(made)
    depth = depth_of(inside)
    for key, value in list(inside.items()):
        if key in DEPTHS:
            inside[key] = len(kept)
        elif key in _COUNTS_FIRST and isinstance(value, int):
            inside[key] = sum(number < value for number in kept)
        elif isinstance(value, list) and not key.endswith(_NO_LIST_OF_BLOCKS):
            inside[key] = _list(key, value, depth, kept)
    return made


def _list(key: str, value: list[Any], depth: int, kept: Sequence[int]) -> list[Any]:
    """A list that is not about blocks stays as it is."""
    if len(value) == depth:
        return [value[number] for number in kept]
    numbers = all(isinstance(each, int) and 0 <= each < depth for each in value)
    if key.endswith(_NUMBERS) and numbers and sorted(set(value)) == value:
        return [kept.index(number) for number in value if number in kept]
    return value
