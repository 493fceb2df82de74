"""Recipes from YAML files: our own, and mergekit's for the methods that both have.

    base: smollm2/                        merge_method: ties
    method: ties                          base_model: smollm2/
    scale: 0.8                            parameters: {lambda: 0.8}
    models:                               models:
      - path: math.delta                    - model: math/
        weight: 0.7                           parameters: {weight: 0.7, density: 0.4}
        density: {mlp: 0.4, default: 0.2}   - model: sql/

A file is read and checked as a whole: all that is wrong is reported at once, before any work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deltafold.errors import UsageError, nearest
from deltafold.foreign import unread
from deltafold.merging import mergekit
from deltafold.merging.recipe import Model, Recipe, Value

OURS = ("base", "method", "sparsify", "consensus", "scale", "numbers", "tokenizer", "models")
THEIRS = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer",
)  # fmt: skip


def read_recipe(path: str | Path) -> tuple[str, Recipe]:
    """(base, recipe) of a file. Raises UsageError with every mistake."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except OSError as error:
        raise unread(error, path, UsageError) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise UsageError(f"{path} is not YAML: {told}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no recipe; see docs/commands/merge.md for one.")
    mistakes: list[str] = []
    base, arguments = (_theirs if "merge_method" in found else _ours)(found, mistakes)
    try:
        recipe = Recipe(**arguments)
    except UsageError as error:
        mistakes.append(str(error))
    if mistakes:
        raise UsageError(f"{path}: " + " ".join(mistakes))
    return base, recipe


def _known(found: dict[str, Any], known: tuple[str, ...], where: str, mistakes: list[str]) -> None:
    for key in found:
        if key not in known:
            mistakes.append(f"{where} has no {key!r}; {nearest(str(key), list(known))}")


def _models(found: dict[str, Any], mistakes: list[str]) -> list[dict[str, Any]]:
    models = found.get("models")
    if not isinstance(models, list) or not all(isinstance(each, dict) for each in models):
        mistakes.append("models must be a list of fine-tunes.")
        return []
    return models


def _ours(found: dict[str, Any], mistakes: list[str]) -> tuple[str, dict[str, Any]]:
    _known(found, OURS, "A recipe", mistakes)
    models = []
    for each in _models(found, mistakes):
        _known(each, ("path", "weight", "density"), "A model", mistakes)
        if not isinstance(each.get("path"), str):
            mistakes.append("Every model needs a path.")
            continue
        models.append(Model(each["path"], each.get("weight", 1.0), each.get("density")))
    if not isinstance(found.get("base"), str):
        mistakes.append("A recipe needs a base.")
    numbers = found.get("numbers", {})
    return str(found.get("base")), {
        "models": tuple(models),
        "method": found.get("method", "ties"),
        "sparsifier": found.get("sparsify"),
        "consensus": found.get("consensus"),
        "scale": found.get("scale"),
        "numbers": numbers if isinstance(numbers, dict) else {"numbers": 0.0},
        "tokenizer": found.get("tokenizer"),
    }


def _theirs(found: dict[str, Any], mistakes: list[str]) -> tuple[str, dict[str, Any]]:
    _known(found, THEIRS, "A file of mergekit's, as far as it is read here,", mistakes)
    method = str(found["merge_method"])
    if method not in mergekit.METHODS:
        near = nearest(method, list(mergekit.METHODS))
        mistakes.append(f"merge_method {method!r} is not read here; {near}")
        method = "linear"
    known = (*mergekit.SHARED, *mergekit.EACH)
    part, blocks = _slice(found, mistakes)
    scopes = [_parameters(each, known, "parameters", mistakes) for each in (part, found)]
    models = _models(part or found, mistakes)
    base = found.get("base_model") or (models[0].get("model") if models else None)
    if not isinstance(base, str):
        mistakes.append("base_model is missing.")
    made, owns = [], []
    for each in models:
        own = _parameters(each, mergekit.EACH, f"{each.get('model')}: parameters", mistakes)
        if each.get("model") == base and method not in ("linear", "slerp"):
            continue  # the base has no delta
        weight, density = (mergekit.setting(n, 1.0, own, *scopes) for n in ("weight", "density"))
        made.append(Model(str(each.get("model")), weight, density))
        owns.append(own)
    if method == "slerp":
        made = _arc(str(base), made, mergekit.setting("t", 0.5, *scopes), mistakes)
    return str(base), {
        "models": tuple(made),
        "method": mergekit.METHODS[method].name,
        "scale": mergekit.setting("lambda", 1.0, *scopes),
        "numbers": mergekit.numbers(method, scopes[1] | scopes[0], owns, mistakes),
        "tokenizer": _tokenizer(found, mistakes),
        "blocks": blocks,
    }


def _slice(found: dict[str, Any], mistakes: list[str]) -> tuple[dict[str, Any], int | None]:
    """The one slice of a file with `slices`, as if it were written with `models`; and its blocks.

    A slice takes the same blocks of each model, here all of them: {sources: [{model, layer_range:
    [0, n]}, ...]}. Without slices: an empty table and None.
    """
    if "slices" not in found:
        return {}, None
    slices = found["slices"]
    sources: Any = (slices[0].get("sources") if _is_one_table(slices) else None) or []
    ranges: list[Any] = [s.get("layer_range") if isinstance(s, dict) else None for s in sources]
    whole = bool(ranges) and all(
        isinstance(each, list) and len(each) == 2 and each == ranges[0] and each[0] == 0
        for each in ranges
    )
    if not whole or not isinstance(ranges[0][1], int):
        mistakes.append(
            "slices are read where there is one, with the same layer_range [0, n] for all its "
            "sources: a merge takes whole models."
        )
        return {"models": []}, None
    _known(slices[0], ("sources", "parameters"), "A slice", mistakes)
    for each in sources:
        _known(each, ("model", "layer_range", "parameters"), "A source", mistakes)
    return {"models": sources, "parameters": slices[0].get("parameters")}, int(ranges[0][1])


def _is_one_table(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict)


def _parameters(
    found: dict[str, Any], known: tuple[str, ...], where: str, mistakes: list[str]
) -> dict[str, Any]:
    given = found.get("parameters") or {}
    if not isinstance(given, dict):
        mistakes.append(f"{where} must be a table.")
        return {}
    _known(given, known, where, mistakes)
    return given


def _tokenizer(found: dict[str, Any], mistakes: list[str]) -> str | None:
    """mergekit's `tokenizer_source: union`, or `tokenizer: {source: union}`."""
    given = found.get("tokenizer")
    if isinstance(given, dict):
        _known(given, ("source",), "tokenizer, as far as it is read here,", mistakes)
        given = given.get("source")
    given = found.get("tokenizer_source", given)
    return None if given is None else str(given).removeprefix("model:")


def _arc(base: str, models: list[Model], t: Value, mistakes: list[str]) -> list[Model]:
    """slerp between the base and the other model, at t; t may be a gradient."""
    others = [model for model in models if model.path != base]
    if len(others) != 1:
        mistakes.append("slerp takes base_model and one other model.")
        return models
    return [Model(base, mergekit.complement(t)), Model(others[0].path, t)]
