"""Tensors that one side keeps in one and the other in several: rows of parts, one after the other.

    experts.gate_up_proj [E, 2 I, H]  =  experts.0.gate_proj, experts.0.up_proj, experts.1.gate_proj ...
    qkv_proj [q + 2 k, H]             =  q_proj, k_proj, v_proj

Either side may be the one that joins. Layouts that are not rows in order (transposed, interleaved by
head) are not told here: such tensors have no counterpart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deltafold.compressing.methods.renaming import Renaming, Shape, Shapes
from deltafold.dtypes import folded

Rows = tuple[str, int, int]
"""Rows [start, stop) of the base's tensor of this name, seen as a matrix."""

_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "Wqkv": (("q_proj", "k_proj", "v_proj"), ("Wq", "Wk", "Wv")),
    "wqkv": (("wq", "wk", "wv"), ("q_proj", "k_proj", "v_proj")),
    "in_proj": (("q_proj", "k_proj", "v_proj"),),
    "qkv": (("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")),
    "w13": (("w1", "w3"), ("gate_proj", "up_proj")),
}
_ALIASES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # of experts
_ALIASES |= {theirs: ours for ours, theirs in _ALIASES.items()}


def rearranged(
    base: Shapes, tuned: Shapes, left: Iterable[str], renaming: Renaming
) -> dict[str, tuple[Rows, ...]]:
    """Where in the base the rows of the fine-tune's tensors `left` are, for those that are found."""
    ours = {renaming.tuned_name(name): name for name in left}
    theirs = {renaming.base_name(name): name for name in base}
    found: dict[str, tuple[Rows, ...]] = {}
    for plain, name in ours.items():  # joined here, apart in the base
        for parts in _expansions(plain, theirs):
            sources = [theirs[part] for part in parts]
            if _make_up(tuned[name], [base[source] for source in sources]):
                found[name] = tuple((source, 0, folded(base[source])[0]) for source in sources)
                break
    apart = {plain: name for plain, name in ours.items() if name not in found}
    for plain, name in theirs.items():  # joined in the base, apart here
        for parts in _expansions(plain, apart):
            shapes = [tuned[apart[part]] for part in parts]
            if _make_up(base[name], shapes):
                at = 0
                for part, shape in zip(parts, shapes, strict=True):
                    rows = folded(shape)[0]
                    found.setdefault(apart[part], ((name, at, at + rows),))
                    at += rows
                break
    return found


def _expansions(name: str, known: Mapping[str, str]) -> list[list[str]]:
    """Lists of names in `known` whose rows, in this order, may be those of `name`."""
    words = name.split(".")
    kind = words[-1] if words[-1] in ("weight", "bias") else None
    stem = words[:-1] if kind else words
    if not stem:
        return []
    leaf, before, end = stem[-1], ".".join(stem[:-1]), f".{kind or 'weight'}"
    options = list(_PARTS.get(leaf, ()))
    if len(stem) > 1 and stem[-2] == "experts":
        options += [(each,) for each in (leaf, _ALIASES.get(leaf)) if each]
        return [found for parts in options if (found := _of_experts(before, parts, end, known))]
    if len(stem) > 2 and stem[-2].isdigit() and leaf in _ALIASES:
        options.append((_ALIASES[leaf],))
    lists = [[f"{before}.{part}{end}" for part in parts] for parts in options]
    return [names for names in lists if all(each in known for each in names)]


def _of_experts(
    before: str, parts: tuple[str, ...], end: str, known: Mapping[str, str]
) -> list[str]:
    """Names of the parts of each expert: 0, 1, ... as far as there are any."""
    found: list[str] = []
    while True:
        number = len(found) // len(parts)
        names = [f"{before}.{number}.{part}{end}" for part in parts]
        if not all(name in known for name in names):
            return found
        found += names


def _make_up(whole: Shape, parts: list[Shape]) -> bool:
    """Whether the rows of the parts are as many as those of the whole, and as wide."""
    if any(len(part) < 2 for part in parts) or len(whole) < 2:
        return False
    rows, columns = folded(whole)
    matrices = [folded(part) for part in parts]
    return sum(m[0] for m in matrices) == rows and all(m[1] == columns for m in matrices)
