"""What was written computes what was drafted: both are run on a few tokens, block by block.

    draft     the whole model's blocks, those that are kept, with the numbers that they had there
    folder    the folder's own config and weights, blocks numbered anew

The same tensors go through both, so the hidden states must be the same. A difference is a block that
computes by its number in a way that its settings do not show. Windows over the text are narrowed for
this in both, so that they matter on a short text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from deltafold.blocks.configs import Config
from deltafold.blocks.layout import Read
from deltafold.calibration import Sample, StreamedModel, make_batches
from deltafold.checkpoint import Checkpoint, open_checkpoint
from deltafold.errors import DeltafoldError, DeltafoldWarning, MismatchError
from deltafold.folding.config import narrowed, numbers_in_words, put_config
from deltafold.folding.methods.draft import Block, Draft
from deltafold.foreign import first_line

TOKENS, SAMPLES, WINDOW = 48, 2, 8
TOLERANCE = 1e-4
"""Of the largest hidden state. The same operations on the same numbers: mostly it is nothing."""


def check_computes(
    draft: Draft, checkpoint: Checkpoint, folder: Path, scratch: Path, grown: Collection[str] = ()
) -> str | None:
    """Raises MismatchError where the folder's model is not the draft.

    Tensors in `grown` are in the folder in part only. Returns why the two could not be run, or None
    where they were.
    """
    with open_checkpoint(folder) as written:
        written.label = checkpoint.label
        try:
            whole, short = _models(draft, checkpoint, written, scratch, grown)
            samples = _samples(whole)
            ended = [
                _last_states(model, samples, numbers)
                for model, numbers in ((whole, draft.numbers), (short, list(range(len(draft)))))
            ]
        except DeltafoldError as error:
            said = str(error).replace(str(folder), checkpoint.label)
            return said.replace(str(checkpoint.path), checkpoint.label)
        _check_cache(short, checkpoint.label)
    one, other = ended
    apart = float((one - other).abs().max())
    if not apart <= TOLERANCE * float(one.abs().max()):
        raise MismatchError(
            f"With only blocks {numbers_in_words(draft.numbers)} of {checkpoint.label} left, they no "
            f"longer compute what they did (hidden states differ by {apart:.3g}): what they compute "
            "depends on a block's number, or on how many there are; remove the last blocks instead, "
            "or fold another model."
        )
    return None


def _check_cache(model: StreamedModel, label: str) -> None:
    """Raises MismatchError for a model that transformers cannot give a cache."""
    ids = torch.zeros(1, 3, dtype=torch.long, device="cpu")
    try:
        with model.skeleton.filled(model.skeleton.outside(), model.weights):
            model.entry.note(ids, use_cache=True)
    except MismatchError as error:
        why = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise MismatchError(
            f"What is left of {label} cannot generate text: transformers cannot run it with a cache "
            f"({why}); fold another model."
        ) from error


def _models(
    draft: Draft,
    checkpoint: Checkpoint,
    written: Checkpoint,
    scratch: Path,
    grown: Collection[str],
) -> tuple[StreamedModel, StreamedModel]:
    """(the whole model with the folder's tensors, the folder's model), windows narrowed.

    Raises DeltafoldError where these cannot be run block by block.
    """
    plain = StreamedModel(written)
    inner: Config = plain.skeleton.model.config.get_text_config(decoder=True).to_dict()
    folders: list[Path] = []
    for name, config in (("whole", checkpoint.config()), ("short", written.config())):
        folders.append(scratch / f"check-{name}")
        put_config(narrowed(dict(config), inner, WINDOW), folders[-1])
    made = draft_of(draft, written)

    def weights(name: str) -> torch.Tensor:
        return checkpoint.tensor(name) if name in grown else made.tensor(name)

    whole = _streamed(checkpoint, weights, folders[0])
    return whole, _streamed(written, None, folders[1])


def _streamed(
    checkpoint: Checkpoint, weights: Callable[[str], torch.Tensor] | None, folder: Path
) -> StreamedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeltafoldWarning)
        made = StreamedModel(checkpoint, weights, folder=folder)
    if made.skeleton.is_whole:
        raise MismatchError(
            f"Only transformers can put the weights of {checkpoint.label} together, as a whole."
        )
    return made


def _samples(model: StreamedModel) -> list[Sample]:
    length = min(TOKENS, model.context or TOKENS)
    if length < 2:
        length = TOKENS  # a config that says -1 for no bound
    step = 1 + model.vocabulary // (length * SAMPLES + 1)
    ids = [step * (n + 1) % model.vocabulary for n in range(length * SAMPLES)]
    return [Sample(tuple(ids[n * length : (n + 1) * length])) for n in range(SAMPLES)]


def _last_states(model: StreamedModel, samples: list[Sample], numbers: list[int]) -> torch.Tensor:
    with model.forward(make_batches(samples), blocks=numbers) as done:
        return done.last[0].clone()


def draft_of(folded: Draft, checkpoint: Checkpoint) -> Draft:
    """The draft `folded` with the tensors of what was written of it."""
    layout = folded.layout

    def reader(place: int) -> Read:
        return lambda local: checkpoint.tensor(layout.name(place, local))

    blocks = tuple(
        Block(block.number, reader(place), block.parts, changed=True)
        for place, block in enumerate(folded.blocks)
    )
    return Draft(layout, checkpoint.tensor, blocks)
