"""mergekit's settings in our words: what its methods take by default, its filters and gradients.

A setting there is a number, a list of numbers (a gradient over the blocks), or a list of conditions,
of which the first counts whose `filter` is part of the tensor's name. It is looked up with the
model, then among `parameters` of the whole file, and then is the method's usual number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltafold.merging.recipe import Value

ALL_BLOCKS = "blocks 0-999999"
SHARED = ("normalize", "lambda", "t", "int8_mask", "rescale")
EACH = ("weight", "density", "gamma", "epsilon")


@dataclass(frozen=True)
class Method:
    """Our method for one of mergekit's; what it does if `normalize` and `rescale` are not given."""

    name: str
    normalize: bool = False
    rescale: bool | None = None  # None: makes no difference


METHODS = {
    "linear": Method("average", normalize=True),
    "task_arithmetic": Method("task-arithmetic"),
    "ties": Method("ties", normalize=True, rescale=False),
    "dare_linear": Method("dare", rescale=True),
    "dare_ties": Method("dare-ties", rescale=True),
    "della": Method("della", normalize=True, rescale=True),
    "della_linear": Method("della-linear", rescale=True),
    "breadcrumbs": Method("breadcrumbs", rescale=False),
    "breadcrumbs_ties": Method("breadcrumbs-ties", rescale=False),
    "slerp": Method("slerp"),
}


def setting(name: str, usual: float, *scopes: dict[str, Any]) -> Value:
    """A setting of the first of `scopes` that has it for a tensor; `usual` where none has.

    >>> setting("weight", 1.0, {}, {"weight": [{"filter": "mlp", "value": [0, 1]}]})
    [{'filter': 'mlp', 'value': {'blocks 0-999999': [0, 1], 'default': 0}}, {'value': 1.0}]
    >>> setting("weight", 1.0, {"weight": 0.5}, {"weight": 2})
    0.5
    """
    found: list[dict[str, Any]] = []
    for given in [*(scope[name] for scope in scopes if name in scope), usual]:
        for each in _conditions(given):
            value = _gradient(each.get("value"))
            if each.get("filter") in (None, "*"):
                return [*found, {"value": value}] if found else value
            found.append({"filter": each["filter"], "value": value})
    return found


def numbers(
    method: str, whole: dict[str, Any], models: list[dict[str, Any]], mistakes: list[str]
) -> dict[str, Any]:
    """The numbers of our rule. Adds to `mistakes` what is asked and not done here."""
    usual = METHODS[method]
    found = {"normalize": float(bool(whole.get("normalize", usual.normalize)))}
    if usual.name.endswith("ties") or method == "della":
        found["sign_of_zero"] = 1.0
    if method == "linear" and not found["normalize"]:
        mistakes.append(
            "linear without normalize is not read here; weights that sum to 1 need none."
        )
    if usual.rescale not in (None, bool(whole.get("rescale", usual.rescale))):
        mistakes.append(f"rescale is always {usual.rescale} for {method} here; drop it.")
    for name in ("gamma", "epsilon"):
        given = [scope[name] for scope in (*models, whole) if name in scope]
        if any(each != given[0] for each in given):
            mistakes.append(f"{name} must be the same for all models.")
        elif given:
            found[name] = given[0]
    if method.startswith("della"):  # theirs is half of the paper's range of probabilities
        half = found.get("epsilon", 0.15)
        found["epsilon"] = 2 * half if isinstance(half, int | float) else half
    return found


def complement(t: Value) -> Value:
    """1 - t, of any setting."""
    if isinstance(t, list):
        return [complement(each) for each in t]
    if isinstance(t, dict):
        return {k: each if k == "filter" else complement(each) for k, each in t.items()}
    return 1 - t if isinstance(t, int | float) else t


def _conditions(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, dict):
        return [given]
    if isinstance(given, list) and given and all(isinstance(each, dict) for each in given):
        return given
    return [{"value": given}]


def _gradient(value: Any) -> Value:
    """Tensors outside of blocks, the head too, take the first entry there."""
    return {ALL_BLOCKS: value, "default": value[0]} if isinstance(value, list) and value else value
