"""Where in a model the delta of a checkpoint tensor can live as an adapter.

    linear      y = x W^T                     pair: B A is added to W (o x i)
    conv1d      y = x W, stored transposed    pair: (B A)^T is added to W (i x o)
    embedding   a row of W for each id        pair: the same, looked up by id
    whole       a norm                        no pair: the new values as they are
    none        anything else                 with the reason why

Told from the modules of the base's config, built without weights. A tensor may be two modules' (tied
embeddings); a module may have another name than its tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from deltafold.calibration.building import build, stored_buffers
from deltafold.calibration.models import is_causal
from deltafold.calibration.usage import is_conv1d, is_linear, is_passed_over, looks_up_ids
from deltafold.calibration.wiring import Group, wire
from deltafold.errors import CheckpointError, DeltafoldError, MismatchError
from deltafold.names import role_of

Kind = Literal["linear", "conv1d", "embedding", "whole", "none"]
PAIRED: tuple[Kind, ...] = ("linear", "conv1d", "embedding")


@dataclass(frozen=True)
class Place:
    """One module that a checkpoint tensor belongs to. `rest`: no projection inside a block.

    `leaf` is what the module calls it, where it is given whole: a file may say `gamma` for `weight`.
    """

    module: str
    kind: Kind
    rest: bool = False
    why: str = ""
    leaf: str = ""


@dataclass(frozen=True)
class Layout:
    """The places of every tensor, and what each module of the model is to a pair."""

    places: dict[str, list[Place]]
    modules: dict[str, Kind]
    tied: bool
    embedding: str  # the module that looks up the embeddings of input ids
    model_type: str
    config: dict[str, Any]
    causal: bool = True


def find_places(folder: Path, names: Collection[str]) -> Layout:
    """Places of the checkpoint tensors `names` in the model of a folder's config.

    Raises MismatchError where transformers knows no such model, CheckpointError without a config.
    """
    try:
        model = build(folder, causal=False)
    except MismatchError as error:
        raise MismatchError(
            f"An adapter needs to know the modules of {folder}, and they cannot be told "
            f"({_clause(error)}); use restore instead."
        ) from None
    except CheckpointError as error:
        if error.passing:
            raise
        raise CheckpointError(f"No adapter can be made: {error}") from None
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False)) | stored_buffers(model)
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        by_parameter.setdefault(id(parameter), []).append(name)
    places: dict[str, list[Place]] = {name: [] for name in names}
    for group in {id(group): group for group in wire(model, names).values()}.values():
        for source in group.names:
            targets = [t for t in group.targets if t in parameters]
            twins = [by_parameter[id(parameters[t])] for t in targets]
            owners = dict.fromkeys(name for names in twins for name in names)
            places[source] = [_place(modules, name, group) for name in owners]
    for found in places.values():
        if not found:
            found.append(Place("", "none", why="the model has no use for it"))
    tied = any(len(found) > 1 for found in places.values())
    kinds = {path: _kind(module) for path, module in modules.items()}
    return Layout(
        places,
        kinds,
        tied,
        next((p for p, m in modules.items() if m is _embedding(model)), ""),
        str(model.config.model_type),
        model.config.to_dict(),
        is_causal(type(model), model.config),
    )


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # of a model that reads no ids
        return model


def _clause(error: DeltafoldError) -> str:
    return re.split(r"[;.] ?$|; ", str(error))[0]


def _kind(module: nn.Module) -> Kind:
    if is_linear(module):
        return "linear"
    if looks_up_ids(module):
        return "embedding"
    if is_conv1d(module):
        return "conv1d"
    return "none"


def _place(modules: dict[str, nn.Module], parameter: str, group: Group) -> Place:
    path, _, leaf = parameter.rpartition(".")
    module = modules[path]
    kind, role = _kind(module), role_of(parameter)
    if group.converter is not None:
        why = "experts are one parameter to transformers; a pair reaches modules only"
        return Place(path, "none", why=why)
    if kind != "none" and leaf == "weight":
        if is_passed_over(modules[""], path):
            return Place(
                path, "none", why="the model reads its weight past the layer, and a pair with it"
            )
        rest = kind == "embedding" or role in ("embedding", "head")
        return Place(path, kind, rest=rest)
    if kind != "none":
        return Place(path, "none", rest=True, why="the bias of a layer that takes a pair")
    is_leaf = next(module.children(), None) is None
    held = [*module.parameters(), *module.buffers()]
    if is_leaf and all(each.dim() <= 1 for each in held):
        return Place(path, "whole", rest=True, leaf=leaf)
    return Place(
        path, "none", rest=role == "router", why="its module is no layer that takes a pair"
    )
