"""Which tensor of the base a fine-tune's tensor is, where names differ by a fixed part.

Told from names and shapes alone. Two things are tried on names that the base does not have: words
that only one side has are taken out (`_orig_mod`, `base_layer`, `module`), and a prefix is put in
place of another (`model.language_model.` for `language_model.model.`, none for `model.`). A rule must
lead to a tensor of the same shape; values are looked at later, see `compressing/survey.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from deltafold.names import is_vocabulary

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Words = tuple[str, ...]
MIN_SUFFIX = 2  # words that two names must share at their ends


@dataclass
class Renaming:
    """Names of the base by names of the fine-tune, and the rules that gave them."""

    found: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)  # words of the fine-tune's names
    missing: set[str] = field(default_factory=set)  # words of the base's names
    prefixes: list[tuple[Words, Words]] = field(default_factory=list)  # the fine-tune's, the base's

    def tuned_name(self, name: str) -> str:
        """A name of the fine-tune as far as the rules bring it towards the base's."""
        words = tuple(word for word in name.split(".") if word not in self.dropped)
        for ours, theirs in sorted(self.prefixes, key=lambda rule: -len(rule[0])):
            if words[: len(ours)] == ours:
                words = theirs + words[len(ours) :]
                break
        return ".".join(word for word in words if word not in self.missing)

    def base_name(self, name: str) -> str:
        """A name of the base without the words that the fine-tune's do not have."""
        return ".".join(word for word in name.split(".") if word not in self.missing)

    def describe(self) -> list[str]:
        """The rules in words."""
        told = [f"without {word}." for word in sorted(self.dropped)]
        told += [f"with {word}." for word in sorted(self.missing)]
        for ours, theirs in self.prefixes:
            told.append(f"prefix {_prefix(ours)} for {_prefix(theirs)}")
        return told


def _prefix(words: Words) -> str:
    return ".".join(words) + "." if words else "(none)"


def fits(base: Shape, tuned: Shape, name: str) -> bool:
    """Whether a tensor may be the counterpart: the same shape, but for rows of a vocabulary."""
    if base == tuned:
        return True
    return len(base) == len(tuned) == 2 and base[1] == tuned[1] and is_vocabulary(name)


def find_renaming(base: Shapes, tuned: Shapes) -> Renaming:
    """Counterparts of the names of `tuned` that `base` does not have."""
    result = Renaming()
    left = {name: shape for name, shape in tuned.items() if name not in base}
    free = {name: shape for name, shape in base.items() if name not in tuned}
    if not left or not free:
        return result
    sides = _Sides(
        base, tuned, left, free, _words(left) - _words(base), _words(free) - _words(tuned)
    )
    _by_words(sides, result)
    _by_prefix(sides, result)
    return result


@dataclass
class _Sides:
    """What is still to be paired, and the words that only the names of one side have."""

    base: Shapes
    tuned: Shapes
    left: dict[str, Shape]
    free: dict[str, Shape]
    ours: set[str]
    theirs: set[str]

    def plain_left(self) -> dict[str, str]:
        """Names without our words, each the only one that comes to that."""
        return _unique(self.left, self.ours)

    def plain_free(self) -> dict[str, str]:
        return _unique(self.free, self.theirs)

    def pair(self, pairs: dict[str, str], result: Renaming) -> None:
        result.found |= pairs
        for name, source in pairs.items():
            result.dropped |= self.ours & set(name.split("."))
            result.missing |= self.theirs & set(source.split("."))
            del self.left[name]
            self.free.pop(source, None)

    def fits(self, source: str, name: str) -> bool:
        return fits(self.base[source], self.tuned[name], name)


def _by_words(sides: _Sides, result: Renaming) -> None:
    """Names that are the same without the words that only one side uses.

    Where that leaves several the same (`input_linear`, `output_linear`), shapes tell them apart.
    """
    sources = sides.plain_free()
    pairs = {}
    for name in sides.left:
        source = sources.get(_without(name, sides.ours))
        if source is not None and sides.fits(source, name):
            pairs[name] = source
    shaped = [_by_shape(sides.left, sides.ours), _by_shape(sides.free, sides.theirs)]
    for key in shaped[0].keys() & shaped[1].keys():
        pairs.setdefault(shaped[0][key], shaped[1][key])
    sides.pair(pairs, result)


def _by_shape(names: Shapes, words: set[str]) -> dict[tuple[str, Shape], str]:
    """Names by what is left of them and their shape, where both together are no other's."""
    keys = {
        name: (_without(name, words).removesuffix(".weight"), shape)  # fused experts have none
        for name, shape in names.items()
    }
    counts = Counter(keys.values())
    return {key: name for name, key in keys.items() if counts[key] == 1}


def _by_prefix(sides: _Sides, result: Renaming) -> None:
    """Names that are the same but for how they begin, by the rule that holds for most, then the next."""
    for rule, _ in sorted(_votes(sides).items(), key=lambda item: (-item[1], item[0])):
        sources = sides.plain_free()
        under = {p: n for p, n in sides.plain_left().items() if _begins(p, rule[0])}
        pairs = {}
        for plain, name in under.items():
            source = sources.get(".".join(rule[1] + tuple(plain.split("."))[len(rule[0]) :]))
            if source is not None and sides.fits(source, name):
                pairs[name] = source
        numbered = any(word.isdigit() for name in pairs for word in name.split("."))
        if pairs and (numbered or 2 * len(pairs) >= len(under)):
            result.prefixes.append(rule)
            sides.pair(pairs, result)


def _votes(sides: _Sides) -> Counter[tuple[Words, Words]]:
    """For each rule, ours for theirs, how many names end longest where it puts them."""
    endings = defaultdict(list)
    for plain in sides.plain_free():
        words = tuple(plain.split("."))
        for start in range(len(words) - MIN_SUFFIX + 1):
            endings[words[start:]].append(words[:start])
    votes: Counter[tuple[Words, Words]] = Counter()
    for plain in sides.plain_left():
        words = tuple(plain.split("."))
        for start in range(len(words) - MIN_SUFFIX + 1):
            if found := endings.get(words[start:]):
                votes.update((words[:start], theirs) for theirs in found)
                break
    return votes


def _begins(name: str, prefix: Words) -> bool:
    return tuple(name.split("."))[: len(prefix)] == prefix


def _words(names: Iterable[str]) -> set[str]:
    return {word for name in names for word in name.split(".") if not word.isdigit()}


def _without(name: str, words: set[str]) -> str:
    return ".".join(word for word in name.split(".") if word not in words)


def _unique(names: Iterable[str], words: set[str]) -> dict[str, str]:
    """Names by what is left of them without `words`, where that is no other's."""
    plain = {name: _without(name, words) for name in names}
    counts = Counter(plain.values())
    return {short: name for name, short in plain.items() if counts[short] == 1}
