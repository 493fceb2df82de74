"""What an `export` run is to do with each tensor, decided from names and headers before any work."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from deltafold.archive import Archive, Tensor
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.json_files import CONFIG_FILE, parse_object
from deltafold.errors import MismatchError, UsageError, nearest
from deltafold.exporting.engines import refusal
from deltafold.exporting.methods.ranks import Choice
from deltafold.exporting.places import PAIRED, Layout, Place, find_places
from deltafold.exporting.request import RESTS, Rest
from deltafold.restoring.decode import check_codecs
from deltafold.restoring.ground import fitted_base

_TALKS = re.compile(r"(CausalLM|LMHeadModel|ConditionalGeneration)$", re.I)
How = Literal["pair", "whole", "fold", "none", "equal"]

# Fields of a config that do not change what a model computes of given tokens.
_HARMLESS = {
    "_name_or_path", "architectures", "dtype", "eos_token_id", "bos_token_id", "pad_token_id",
    "torch_dtype", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One tensor: a pair at each of `places`, given whole, folded into a base, or not at all.

    `shape` is that of the delta as it acts, out features x in features, in rows that the base has.
    """

    tensor: Tensor
    how: How
    places: tuple[Place, ...]
    shape: tuple[int, int]
    why: str = ""

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def transposed(self) -> bool:
        """True if the tensor is stored in features x out features."""
        return any(place.kind == "conv1d" for place in self.places)


@dataclass(frozen=True)
class ExportJob:
    """One run: an archive on its base, and how each tensor goes out."""

    archive: Archive
    base: Checkpoint
    layout: Layout
    choice: Choice
    runtime: str
    rest: Rest
    items: tuple[Item, ...]
    notes: tuple[str, ...]

    def of(self, *hows: How) -> list[Item]:
        return [item for item in self.items if item.how in hows]

    def identity(self) -> dict[str, Any]:
        """What unfinished work is bound to."""
        return {
            "archive": self.archive.identity,
            "base": self.base.fingerprint(),
            "choice": [self.choice.rank, self.choice.energy, self.choice.n_bytes],
            "runtime": self.runtime,
            "rest": self.rest,
        }


def make_job(
    archive: Archive, base: Checkpoint, choice: Choice, runtime: str, rest: str
) -> ExportJob:
    """Raises UsageError, ArchiveError, MismatchError, CheckpointError."""
    if rest not in RESTS:
        raise UsageError(f"There is no way {rest!r} for --rest; {nearest(rest, list(RESTS))}")
    check_codecs(archive)
    origin, base = base, fitted_base(archive, base)
    _check_class(archive, base)
    layout = find_places(base.path, list(origin.tensors))
    if not layout.causal and runtime != "peft":
        raise MismatchError(
            f"{base.label} is no causal language model, and {runtime} takes adapters of such only; export "
            "for peft, or use restore."
        )
    layout.places.update(_places_of_renamed(archive, layout))
    items = tuple(_item(tensor, base, layout, runtime, rest) for tensor in archive.manifest.tensors)
    items = tuple(_with_module(item, items) for item in items)
    if not any(item.how in ("pair", "whole", "fold") for item in items):
        reasons = sorted({item.why for item in items if item.why})
        raise MismatchError(
            f"Nothing of {archive.folder} can go into an adapter: "
            + ("; ".join(reasons) or "it equals its base")
            + "."
        )
    made = ExportJob(archive, base, layout, choice, runtime, rest, items, ())
    return replace(made, notes=tuple(_notes(made)))


def _check_class(archive: Archive, base: Checkpoint) -> None:
    """Raises MismatchError where the fine-tune is another kind of model than a language model."""
    config = _config_of_finetuned(archive, base)
    theirs, ours = ((each.get("architectures") or [None])[0] for each in (config, base.config()))
    if theirs in (None, ours) or ours is None or _TALKS.search(str(theirs)):
        return
    raise MismatchError(
        f"{archive.folder} is a {theirs} and its base a {ours}; an adapter cannot carry what the "
        "base's kind of model has no place for; use restore instead."
    )


def _config_of_finetuned(archive: Archive, base: Checkpoint) -> dict[str, Any]:
    """Empty where the archive has none. Raises CheckpointError."""
    entry = next((each for each in archive.manifest.files if each.name == CONFIG_FILE), None)
    if entry is None:
        return {}
    return parse_object(archive.side_file(entry, base), f"config.json of {archive.folder}")


def _places_of_renamed(archive: Archive, layout: Layout) -> dict[str, list[Place]]:
    """Places of tensors that the base has under another name: its own, if no other has them."""
    tensors = archive.manifest.tensors
    takers = Counter(
        name for t in tensors for name in {each.name for each in t.counterpart} or {t.name}
    )
    found: dict[str, list[Place]] = {}
    for tensor in tensors:
        if tensor.counterpart:
            name = tensor.counterpart[0].name
            alone = len(tensor.counterpart) == 1 and takers[name] == 1
            found[tensor.name] = layout.places.get(name, []) if alone else []
    return found


def _item(tensor: Tensor, base: Checkpoint, layout: Layout, runtime: str, rest: str) -> Item:
    if tensor.base is None:
        how: How = "fold" if rest == "fold" else "none"
        return Item(tensor, how, (), tensor.matrix_shape, "the base has no such tensor")
    info = base.tensors[tensor.name]
    rows, columns = min(tensor.matrix_shape[0], info.matrix_shape[0]), tensor.matrix_shape[1]
    places = tuple(layout.places[tensor.name])
    if tensor.tuned == tensor.base:
        return Item(tensor, "equal", places, (rows, columns))
    shape = (columns, rows) if any(p.kind == "conv1d" for p in places) else (rows, columns)
    how, why = _how(places, layout, runtime, rest)
    if how == "pair" and rows < tensor.matrix_shape[0]:
        why = f"{tensor.matrix_shape[0] - rows} new vocabulary rows do not fit the base"
    return Item(tensor, how, places, shape, why)


def _with_module(item: Item, items: tuple[Item, ...]) -> Item:
    """PEFT wants all parameters of a module that is given whole, those that are equal too."""
    if (
        item.how != "equal"
        or not item.places
        or any(place.kind != "whole" for place in item.places)
    ):
        return item
    given = {place.module for each in items if each.how == "whole" for place in each.places}
    return replace(item, how="whole") if item.places[0].module in given else item


def _how(places: tuple[Place, ...], layout: Layout, runtime: str, rest: str) -> tuple[How, str]:
    if not places:
        return ("fold", "") if rest == "fold" else ("none", "the base's modules hold it otherwise")
    reachable = all(place.kind in PAIRED for place in places)
    if rest == "fold" and (not reachable or any(place.rest for place in places)):
        return "fold", ""
    if rest == "drop" and any(place.rest for place in places):
        return "none", "left out, as asked"
    refused = next(filter(None, (refusal(runtime, p, layout) for p in places)), "")
    if refused:
        return "none", refused
    if reachable:
        return "pair", ""
    if all(place.kind == "whole" for place in places):
        return "whole", ""
    return "none", next(place.why for place in places if place.why)


def _notes(job: ExportJob) -> list[str]:
    """Where base and fine-tune differ in what no adapter can say."""
    notes = []
    removed = [name for name in job.archive.manifest.removed if job.layout.places.get(name)]
    if removed and not job.layout.tied:
        notes.append(f"the fine-tune has no tensor {removed[0]}; the adapter leaves the base's")
    if theirs := _config_of_finetuned(job.archive, job.base):
        ours = job.base.config()
        changed = sorted(
            key for key in {*theirs, *ours} - _HARMLESS if theirs.get(key) != ours.get(key)
        )
        if changed and job.rest != "fold":
            notes.append(
                f"the fine-tune's config differs in {', '.join(changed)}; an adapter has no config"
            )
    return notes
