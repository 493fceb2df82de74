"""The config of a model with fewer blocks: everything that is said of each block follows.

num_hidden_layers  5 -> 3
layer_types        [s, s, s, s, full]   kept 0 1 4 ->   [s, s, full]
max_window_layers  3                    kept 0 1 4 ->   2       the first blocks, counted
mlp_only_layers    [1, 4]               kept 0 1 4 ->   [1, 2]  numbers of blocks
attention_types    [[[g, l], 2], [[g], 1]]              ->   [[[g, l, g], 1]]
out_features       [stage2, stage5]     kept 0 1 4 ->   [stage2, stage3]

What a config leaves out, transformers works out from the number of blocks and the number of each
(every sixth block attends to all). `derived` holds what it worked out for the whole model; lists of it
are written out, shortened, because the rule would give kept blocks another kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from deltafold.errors import MismatchError

Config = dict[str, Any]

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ALSO_DEPTHS = ("num_blocks", "decoder_layers")
_INSIDE = ("text_config", "llm_config", "language_config")
_COUNTS_FIRST = ("max_window_layers", "first_k_dense_replace")
_COUNTS_LAST = ("num_kv_shared_layers",)
_STAGES = ("stage_names", "out_features", "out_indices")
_NUMBERS = ("_layers", "_layer_ids", "_layer_idx", "_layers_idx", "_indices", "_idxs")
_NO_LIST_OF_BLOCKS = ("token_id", "token_ids", "architectures", "torch_dtype", "dtype")


def text_config(config: Config) -> Config:
    """The part that speaks of the text model: some configs hold it inside."""
    for name in _INSIDE:
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
        f"The config of {label} does not name one number of blocks ({', '.join(DEPTHS)}), as that of "
        "a model with an encoder and a decoder, or of several stages, does not; such a model cannot "
        "be folded."
    )


def shortened(
    config: Config, kept: Sequence[int], derived: Mapping[str, Any] | None = None
) -> Config:
    """The config with only the blocks `kept`, ascending numbers of the old ones.

    `derived` is what transformers makes of the whole model's (inner) config.
    """
    made = deepcopy(config)
    inside = text_config(made)
    depth = depth_of(inside)
    for key, value in (derived or {}).items():
        if inside.get(key) is None and _is_of_blocks(key, value, depth):
            inside[key] = deepcopy(value)
    for key, value in list(inside.items()):
        if key in _STAGES:
            inside[key] = _stages(value, kept)
        elif key in DEPTHS or (key in _ALSO_DEPTHS and value == depth):
            inside[key] = len(kept)
        elif _is_count(value):
            if key in _COUNTS_FIRST:
                inside[key] = _first(value, kept)
            elif key in _COUNTS_LAST:
                inside[key] = _last(value, depth, kept)
        elif isinstance(value, list) and not key.endswith(_NO_LIST_OF_BLOCKS):
            inside[key] = _list(key, value, depth, kept)
    return made


def readings(config: Config, made: Config, kept: Sequence[int]) -> Iterator[Config]:
    """Other ways to shorten `config` than `made`, each with one key read in another way.

    A list may hold values or numbers of blocks, and a count may be of the first or the last blocks.
    """
    old, depth = text_config(config), depth_of(config)
    for key, now in text_config(made).items():
        value = old.get(key)
        others: list[Any] = []
        if key in (*DEPTHS, *_STAGES) or key.endswith(_NO_LIST_OF_BLOCKS) or value is None:
            continue
        if isinstance(value, list):
            if len(value) == depth:
                others.append([value[number] for number in kept])
            if _are_numbers(value, depth):
                others.append(_renumbered(value, kept))
            others.append(value)
        elif "layer" in key and _is_count(value) and value <= depth:
            others += [_first(value, kept), _last(value, depth, kept), value]
        for each in others:
            if each != now:
                other = deepcopy(made)
                text_config(other)[key] = each
                yield other


def _stages(value: Any, kept: Sequence[int]) -> Any:
    """States that a backbone gives: 0 or `stem` before the blocks, 3 or `stage3` after three of them."""
    if not isinstance(value, list):
        return value

    def follows(each: Any) -> Any:
        text = str(each).removeprefix("stage")
        if not text.isdigit():
            return each
        number = _first(int(text), kept)
        return number if _is_count(each) else f"stage{number}" if number else "stem"

    return list(dict.fromkeys(follows(each) for each in value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first(value: int, kept: Sequence[int]) -> int:
    return sum(number < value for number in kept)


def _last(value: int, depth: int, kept: Sequence[int]) -> int:
    return sum(number >= depth - value for number in kept)


def _is_of_blocks(key: str, value: Any, depth: int) -> bool:
    """True for a list that says something of each block, or numbers some of them."""
    if not isinstance(value, list) or key.endswith(_NO_LIST_OF_BLOCKS):
        return False
    return len(value) == depth or (key.endswith(_NUMBERS) and _are_numbers(value, depth))


def _are_numbers(value: list[Any], depth: int) -> bool:
    """True for a list that may number blocks: each at most once."""
    whole = all(_is_count(each) and 0 <= each < depth for each in value)
    return whole and len(set(value)) == len(value)


def _renumbered(value: list[int], kept: Sequence[int]) -> list[int]:
    return [kept.index(number) for number in value if number in kept]


def _list(key: str, value: list[Any], depth: int, kept: Sequence[int]) -> list[Any]:
    """A list that is not about blocks stays as it is."""
    if key.endswith(_NUMBERS) and _are_numbers(value, depth):
        return _renumbered(value, kept)
    if len(value) == depth:
        return [value[number] for number in kept]
    repeated = _spelt_out(value)
    if len(repeated) == depth:
        return [[[repeated[number] for number in kept], 1]]
    return value


def _spelt_out(value: list[Any]) -> list[Any]:
    """[[[a, b], 2], [[c], 1]] -> [a, b, a, b, c]; nothing for a list of another form."""
    found: list[Any] = []
    for each in value:
        pair = isinstance(each, list) and len(each) == 2
        if not (pair and isinstance(each[0], list) and _is_count(each[1])):
            return []
        found += each[0] * each[1]
    return found
