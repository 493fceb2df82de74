"""Which checkpoint tensors a model's parameters are made of.

Mostly a parameter is one tensor of the same name. transformers also renames tensors while it loads,
and fuses the experts of a block into one parameter with three dimensions:

    experts.0.w1, experts.1.w1, ...  \\
                                       experts.gate_up_proj   E x (o1 + o3) x i
    experts.0.w3, experts.1.w3, ...  /

The rules are those that `from_pretrained` follows; here they are applied to the names of the whole
checkpoint once, and to the tensors of one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

Weights = Callable[[str], torch.Tensor]
"""A checkpoint tensor's name -> the tensor, in any floating dtype."""


@dataclass(frozen=True)
class Group:
    """Parameters that are made together.

    `sources` holds checkpoint tensors by the pattern that collects them, in the order in which they
    are put together. `converter` is None where a parameter is one tensor as it stands.
    """

    targets: tuple[str, ...]
    sources: dict[str, tuple[str, ...]]
    converter: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """All checkpoint tensors of the group."""
        return tuple(name for names in self.sources.values() for name in names)

    def make(self, model: Any, weights: Weights) -> dict[str, torch.Tensor]:
        """The parameters by name, in their shapes in the model."""
        if self.converter is None:
            return {self.targets[0]: weights(self.names[0])}
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.targets[0], name, pattern, weights(name))
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The pieces of a parameter, or of its gradient, by checkpoint tensor.

        They have their stored shapes. Raises ValueError where the parts of the parameter are not
        slices of it.
        """
        if self.converter is None:
            yield self.names[0], tensor
            return
        if not self.is_experts:
            raise ValueError(
                f"{self.targets[0]} is made from {self.names[0]} by more than stacking"
            )
        width = tensor.shape[1] // len(self.sources)
        for place, names in enumerate(self.sources.values()):
            for expert, name in enumerate(names):
                yield name, tensor[expert, place * width : (place + 1) * width]

    @property
    def is_experts(self) -> bool:
        """True where experts are stacked, and their matrices of equal size joined by rows."""
        steps = [
            (type(each).__name__, each.dim) for each in getattr(self.converter, "operations", ())
        ]
        stacked = steps[:1] == [("MergeModulelist", 0)]
        return stacked and (
            (len(steps) == 1 and len(self.sources) == 1) or steps[1:] == [("Concatenate", 1)]
        )


def wire(model: Any, names: Iterable[str]) -> dict[str, Group]:
    """The group of every parameter that the checkpoint's tensor `names` account for.

    Tied parameters have the group of their partner. Parameters without a group are left out.
    """
    groups: dict[str, Group] = {}
    for group in _groups(model, names):
        groups |= dict.fromkeys(group.targets, group)
    tied: dict[int, Group] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        if name in groups:
            tied.setdefault(id(parameter), groups[name])
    for name, parameter in parameters:
        if name not in groups and id(parameter) in tied:
            groups[name] = tied[id(parameter)]
    return groups


def _groups(model: Any, names: Iterable[str]) -> list[Group]:
    """Groups by the rules of transformers, or by equal names where it does not offer them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # another version of transformers: its inner parts are no promise
        return [Group((name,), {name: (name,)}) for name in names]
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            continue  # a tensor that this model has no use for
        converter = None if pattern is None else by_pattern[pattern]
        _, sources = collected.setdefault(target, (converter, {}))
        sources.setdefault(pattern or name, []).append(name)
    return [
        Group(_targets(target, converter), _ordered(sources, converter), converter)
        for target, (converter, sources) in collected.items()
    ]


def _targets(first: str, converter: Any) -> tuple[str, ...]:
    if converter is None:
        return (first,)
    patterns = converter.target_patterns
    return tuple(first.replace(patterns[0], pattern) for pattern in patterns)


def _ordered(sources: dict[str, list[str]], converter: Any) -> dict[str, tuple[str, ...]]:
    order = list(sources) if converter is None else converter.source_patterns
    return {pattern: tuple(sources[pattern]) for pattern in order if pattern in sources}
