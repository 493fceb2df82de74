"""The base under the fine-tune's names: wrappers, prefixes, rearranged parts, tied heads looked past."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from deltafold.checkpoint import AlignedCheckpoint, Checkpoint, Segment, fits_together
from deltafold.compressing.methods.rearranging import rearranged
from deltafold.compressing.methods.renaming import find_renaming, fits
from deltafold.dtypes import FLOATING
from deltafold.names import block_of, role_of

# Words of wrappers, beside those that begin with `_`: no class of models has parts of these names.
WRAPPERS = frozenset({"module", "base_model", "base_layer", "original_module"})


@dataclass
class Alignment:
    """What the fine-tune's tensors are in the base, where that is not the tensor of the same name."""

    sources: dict[str, tuple[Segment, ...]] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)  # in words, for the summary
    wrapped: bool = False  # the fine-tune's names carry words that no model of its class has

    def taken(self) -> set[str]:
        """Names of the base that some source refers to."""
        return {name for segments in self.sources.values() for name, _, _ in segments}


def align(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Alignment]:
    """The base seen under the fine-tune's names, and what that took; itself if nothing."""
    found = find_alignment(base, tuned)
    return (AlignedCheckpoint(base, found.sources) if found.sources else base), found


def find_alignment(base: Checkpoint, tuned: Checkpoint) -> Alignment:
    """Counterparts by rules, from headers alone."""
    theirs = {name: info.shape for name, info in base.tensors.items()}
    ours = {name: info.shape for name, info in tuned.tensors.items()}
    result = Alignment()
    if all(name in theirs for name in ours):
        return result
    renaming = find_renaming(theirs, ours)
    for name, source in renaming.found.items():
        _take(result, base, tuned, name, ((source, 0, base.tensors[source].matrix_shape[0]),))
    if result.sources:
        result.rules += renaming.describe()
        result.wrapped = any(word.startswith("_") or word in WRAPPERS for word in renaming.dropped)
    left = [name for name in ours if name not in theirs and name not in result.sources]
    free = {n: s for n, s in theirs.items() if n not in ours and n not in result.taken()}
    before = len(result.sources)
    for name, segments in rearranged(free, ours, left, renaming).items():
        _take(result, base, tuned, name, segments)
    if len(result.sources) > before:
        result.rules.append(f"{len(result.sources) - before} made of joined or split parts")
    for name, source in _tied(base, tuned, result):
        segments = ((source, 0, base.tensors[source].matrix_shape[0]),)
        if _take(result, base, tuned, name, segments):
            result.rules.append(f"{name} against {source}")
    return result


def _take(
    result: Alignment,
    base: Checkpoint,
    tuned: Checkpoint,
    name: str,
    segments: tuple[Segment, ...],
) -> bool:
    """Note a source, unless numbers of one kind would stand against numbers of another."""
    dtypes = base.tensors[segments[0][0]].dtype, tuned.tensors[name].dtype
    if (dtypes[0] in FLOATING) != (dtypes[1] in FLOATING):
        return False
    if not fits_together(base, segments):
        return False
    result.sources[name] = segments
    return True


def _tied(base: Checkpoint, tuned: Checkpoint, known: Alignment) -> Iterator[tuple[str, str]]:
    """Embeddings and heads that the base has in one: each against the base's that fits it."""
    vocabulary = [
        name
        for name, info in base.tensors.items()
        if len(info.shape) == 2 and role_of(name) in ("embedding", "head")
    ]
    vocabulary.sort(key=lambda name: -base.tensors[name].shape[0])
    for name, info in tuned.tensors.items():
        if name in base.tensors or name in known.sources or block_of(name) is not None:
            continue
        if len(info.shape) != 2:
            continue
        same = [n for n in vocabulary if base.tensors[n].shape == info.shape]
        grown = [n for n in vocabulary[:1] if fits(base.tensors[n].shape, info.shape, name)]
        if chosen := (same or _of_this_size(tuned, info.shape, grown)):
            yield name, chosen[0]


def _of_this_size(tuned: Checkpoint, shape: tuple[int, ...], grown: list[str]) -> list[str]:
    """`grown`, if the fine-tune's vocabulary has as many rows as a tensor of this shape."""
    sizes = {tuned.config().get("vocab_size")}
    sizes |= {
        info.shape[0]
        for name, info in tuned.tensors.items()
        if len(info.shape) == 2 and role_of(name) == "embedding"
    }
    return grown if shape[0] in sizes else []
