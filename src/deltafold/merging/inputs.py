"""What is merged, settled before any work: heads, vocabularies, tokenizer; refused by name if not.

tensors   every model has the base's, in its shapes; but for rows of the vocabulary
heads     where some models have a head of their own and others use their embedding, the merged
          head is one of its own; a tied model's embedding stands for its head
rows      those of the vocabulary that is asked for, see `merging/vocabulary.py`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from deltafold.checkpoint import DTYPES
from deltafold.dtypes import stored_bytes
from deltafold.errors import MismatchError, UsageError, nearest
from deltafold.merging.recipe import Recipe
from deltafold.merging.sources import Header, Renamed, Source, config_of
from deltafold.merging.tokenizers import (
    Files,
    adopted_files,
    merged_files,
    untied,
    vocabulary_of,
)
from deltafold.merging.vocabulary import Settled, Vocabulary, settle
from deltafold.names import block_of, role_of

SHARED_TOKENS = 0.5  # of two vocabularies that belong to fine-tunes of one base, at least
_POSITIONS = re.compile(r"wpe|position|pos_?emb", re.I)
_HEAD_BIAS = re.compile(r"(lm_head|embed_out|output_layer)\.bias$")


@dataclass(frozen=True)
class Inputs:
    """Base and models under the names of the merged model, and what it will look like.

    `layout` has its tensors; `by_row` those whose rows are the vocabulary's.
    """

    base: Source
    models: list[Source]
    layout: dict[str, Header]
    by_row: frozenset[str]
    settled: Settled
    files: Files
    notes: list[str] = field(default_factory=list)

    @property
    def n_blocks(self) -> int:
        blocks = [block for name in self.layout if (block := block_of(name)) is not None]
        return max(blocks, default=0) + 1

    @property
    def total_bytes(self) -> int:
        """What the merged model will take on disk."""
        weights = 0
        for dtype, shape in self.layout.values():
            weights += stored_bytes(dtype, shape)
        return weights + sum(map(len, self.files.values()))


def settle_inputs(base: Source, models: Sequence[Source], recipe: Recipe) -> Inputs:
    """Raises MismatchError and UsageError with the names of what does not fit."""
    files = [dict(source.side_files()) for source in (base, *models)]
    (base, *tuned), notes, parted = _settle_heads([base, *models], files)
    rows = _vocabulary_rows(base)
    by_row = frozenset(_by_row(base, rows))
    _check_models(base, tuned, by_row)
    owner = _owner(recipe, tuned)
    settled = _settle_rows(base, tuned, files, rows, recipe.tokenizer, owner)
    layout = {
        name: (dtype, (settled.rows, *shape[1:]) if name in by_row else shape)
        for name, (dtype, shape) in base.headers.items()
    }
    made = merged_files(files[0], files[1:], settled, owner) if rows else dict(files[0])
    if parted and "config.json" in made:
        made["config.json"] = untied(made["config.json"])
    labelled = [(source.label, each) for source, each in zip(tuned, files[1:], strict=True)]
    more, told = adopted_files({**files[0], **made}, labelled)
    notes = notes + settled.notes + told
    inputs = Inputs(base, tuned, layout, by_row, settled, made | more, notes)
    if recipe.blocks not in (None, inputs.n_blocks):
        raise MismatchError(
            f"{base.label} has {inputs.n_blocks} blocks, but the slices take {recipe.blocks}; a merge "
            "takes whole models: give all blocks."
        )
    return inputs


def _embedding(source: Source) -> str | None:
    """The table of input embeddings: the longest, as others are looked up by types or languages."""
    found = {
        name: shape[0] for name, (_, shape) in source.headers.items()
        if role_of(name) == "embedding" and len(shape) == 2
        and not _POSITIONS.search(name) and block_of(name) is None
    }  # fmt: skip
    return max(found, key=lambda name: found[name]) if found else None


def _settle_heads(
    sources: Sequence[Source], files: Sequence[Files]
) -> tuple[list[Source], list[str], bool]:
    """Sources that all have the head, or none; notes; whether the base's head is parted from it."""
    found, notes, parted = list(sources), [], False
    heads = {n for source in sources for n in source.headers if role_of(n) == "head"}
    for head in sorted(heads):
        if all(head in source.headers for source in found):
            continue
        for n, source in enumerate(found):  # a stored head that its own config does not use
            if head in source.headers and config_of(source.label, files[n]).get(
                "tie_word_embeddings"
            ):
                found[n] = Renamed(source, hidden=head)
        having = [source.label for source in found if head in source.headers]
        lacking = [source.label for source in found if head not in source.headers]
        if not having:
            continue
        parted = parted or found[0].label in lacking
        for n, source in enumerate(found):
            embedding = _embedding(source)
            if head not in source.headers and embedding is not None:
                found[n] = Renamed(source, twin=(head, embedding))
        notes.append(
            f"{head} is a tensor of its own in {', '.join(having)}, and the embedding in "
            f"{', '.join(lacking)}: the merged model has one of its own."
        )
    return found, notes, parted


def _vocabulary_rows(source: Source) -> int:
    """Rows of the embedding; 0 where there is none."""
    name = _embedding(source)
    return source.headers[name][1][0] if name else 0


def _by_row(source: Source, rows: int) -> list[str]:
    found = []
    for name, (_, shape) in source.headers.items():
        table = role_of(name) in ("embedding", "head") and not _POSITIONS.search(name)
        if rows and shape and shape[0] == rows and (table or _HEAD_BIAS.search(name)):
            found.append(name)
    return found


def _check_models(base: Source, models: Sequence[Source], by_row: frozenset[str]) -> None:
    """Every model must have the base's tensors in the base's shapes. Raises MismatchError by name."""
    for source in models:
        lacking = [name for name in base.headers if name not in source.headers]
        extra = [name for name in source.headers if name not in base.headers]
        if lacking or extra:
            name, does = (lacking[0], "lacks") if lacking else (extra[0], "has")
            other = "has" if lacking else "lacks"
            raise MismatchError(
                f"{source.label} {does} the tensor {name}, which {base.label} {other}; merge "
                "fine-tunes of one base."
            )
        rows = _vocabulary_rows(source)
        for name, (dtype, shape) in source.headers.items():
            theirs, wanted = base.headers[name]
            if shape != wanted and not (name in by_row and shape == (rows, *wanted[1:])):
                raise MismatchError(
                    f"{name} is {list(shape)} in {source.label} and {list(wanted)} in "
                    f"{base.label}; merge fine-tunes of one base."
                )
            if DTYPES[dtype].is_floating_point != DTYPES[theirs].is_floating_point:
                raise MismatchError(
                    f"{name} is {dtype} in {source.label} and {theirs} in {base.label}; give "
                    "both unquantised."
                )


def _owner(recipe: Recipe, models: Sequence[Source]) -> int | None:
    """The number of the model whose tokenizer is asked for. Raises UsageError."""
    choice = recipe.tokenizer
    if choice in (None, "base", "union"):
        return None
    for number, (model, source) in enumerate(zip(recipe.models, models, strict=True)):
        if choice in (model.path, source.label):
            return number
    known = ["base", "union", *(model.path for model in recipe.models)]
    raise UsageError(f"There is no tokenizer {choice!r} to take; {nearest(str(choice), known)}")


def _settle_rows(
    base: Source,
    models: Sequence[Source],
    files: Sequence[Files],
    rows: int,
    choice: str | None,
    owner: int | None,
) -> Settled:
    if not rows:
        return Settled("base", 0, [], [[] for _ in models])
    ground = vocabulary_of(base.label, rows, files[0])
    theirs = [
        vocabulary_of(source.label, _vocabulary_rows(source), each)
        for source, each in zip(models, files[1:], strict=True)
    ]
    for each in theirs:
        _check_related(ground, each)
    return settle(ground, theirs, choice if owner is None else models[owner].label)


def _check_related(base: Vocabulary, model: Vocabulary) -> None:
    """Raises MismatchError where two tokenizers have little in common."""
    if not (base.known and model.known and base.tokens and model.tokens):
        return
    ours, theirs = set(base.tokens.values()), set(model.tokens.values())
    if len(ours & theirs) < SHARED_TOKENS * min(len(ours), len(theirs)):
        raise MismatchError(
            f"{model.label} and {base.label} share {len(ours & theirs):,} of "
            f"{min(len(ours), len(theirs)):,} tokens; they are not fine-tunes of one base."
        )
