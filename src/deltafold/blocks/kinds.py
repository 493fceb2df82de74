"""What each block of a model is, told from the model built of its config: the same without weights.

A block is its classes, the shapes in it, and the settings that its modules hold: a window, whether
positions are rotated, a scale that follows from the number of the block. Two models are compared, a
whole one and one of fewer blocks: each block that is left must be what it was.

    whole    0 slides   1 slides   2 full   3 slides   4 full
    fewer    0 slides              1 slides            2 full       block 2 was 3, block 3 was 4
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_NUMBER = re.compile(r"(?:layer|block)s?_?(?:idx|id|index|number|num)$|^(?:idx|index)$")
_SIMPLE = (int, float, str, bool, torch.dtype)


@dataclass(frozen=True)
class Difference:
    """One thing that the blocks' config cannot keep: `what` was `old` and would be `new`."""

    what: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.what} is {self.old} and would be {self.new}"


def differences(
    whole: nn.Module, short: nn.Module, names: Sequence[str], kept: Sequence[int]
) -> list[Difference]:
    """How the model `short` differs from `whole` in what is left of it.

    `names` are the modules of the whole model's blocks, `kept` the numbers of those that are left.
    """
    found: list[Difference] = []
    prefix = names[0].rpartition(".")[0]
    for place, number in enumerate(kept):
        name = f"{prefix}.{place}"
        one, other = (
            _portrait(whole.get_submodule(names[number])),
            _portrait(short.get_submodule(name)),
        )
        for key in [*one, *(each for each in other if each not in one)]:
            old, new = one.get(key), other.get(key)
            if not (_same(old, new) or _follows(key, old, new, len(names), kept)):
                found.append(Difference(f"{names[number]}.{key}".rstrip("."), old, new))
    found += _around(whole, short, prefix)
    found += _lists(_inner(whole), _inner(short), len(names), kept)
    return found


def _portrait(block: nn.Module) -> dict[str, Any]:
    """Classes, shapes and settings of a block, by name inside it."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        start = f"{path}." if path else ""
        found[path] = type(module).__name__
        held = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in held:
            found[f"{start}{name}"] = None if tensor is None else tuple(tensor.shape)
        found |= {f"{start}{name}": value for name, value in _settings(module)}
    return found


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module itself holds beside tensors and modules: numbers, words, functions."""
    for name, value in vars(module).items():
        if name.startswith("_") or name in ("training", "name_or_path") or "drop" in name:
            continue  # what is dropped is dropped in training only
        if value is None or isinstance(value, _SIMPLE):
            yield name, value
        elif isinstance(value, list | tuple) and all(isinstance(v, _SIMPLE) for v in value):
            yield name, tuple(value)
        elif callable(value) and hasattr(value, "__qualname__"):
            yield name, value.__qualname__


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return old == new or math.isclose(old, new, rel_tol=1e-9)
    return bool(old == new)


def _follows(key: str, old: Any, new: Any, depth: int, kept: Sequence[int]) -> bool:
    """True for the new number of a block, and for what is left of a list with a word for each."""
    if isinstance(old, tuple):
        return len(old) == depth and new == tuple(old[number] for number in kept)
    if not _NUMBER.search(key.rpartition(".")[2]) or not isinstance(old, int):
        return False
    return old in kept and kept.index(old) == new


def _around(whole: nn.Module, short: nn.Module, prefix: str) -> list[Difference]:
    """Settings outside of the blocks that both have: a kind of block may be gone, and what served it.

    Whole numbers may count blocks, so they are left out.
    """
    others = dict(short.named_modules())
    found = []
    for path, module in whole.named_modules():
        if path.startswith(f"{prefix}.") or path not in others:
            continue
        now = dict(_settings(others[path]))
        for name, value in _settings(module):
            if isinstance(value, float | str | bool) and not _same(value, now.get(name, value)):
                found.append(Difference(f"{path}.{name}".lstrip("."), value, now[name]))
    return found


def _inner(model: Any) -> dict[str, Any]:
    made: dict[str, Any] = model.config.get_text_config(decoder=True).to_dict()
    return made


def _lists(
    whole: dict[str, Any], short: dict[str, Any], depth: int, kept: Sequence[int]
) -> list[Difference]:
    """Lists of the config with a word for each block: the model's forward may look them up."""
    found = []
    for key, value in whole.items():
        of_blocks = isinstance(value, list) and len(value) == depth
        if of_blocks and all(isinstance(each, str) for each in value):
            old, new = [value[number] for number in kept], short.get(key)
            if old != new:
                found.append(Difference(f"{key} of the config", old, new))
    return found
