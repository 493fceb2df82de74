"""Samples for a model, from whatever source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deltafold.calibration.batches import Sample
from deltafold.calibration.kept import cache_folder, keep, key_of, read_samples_file, write_samples
from deltafold.calibration.samples import (
    GENERAL,
    PAGES,
    check_limits,
    general_samples,
    page_samples,
    read_samples,
)
from deltafold.calibration.selftext import write_texts
from deltafold.calibration.stream import StreamedModel, default_memory_bytes
from deltafold.calibration.tokens import Encoder, load_tokenizer
from deltafold.running.devices import identity

VERSION = 2


@dataclass(frozen=True)
class Sampling:
    """Which text, and how much of it.

    `source` is a file, `datasets:NAME[:SPLIT[:FIELD]]`, `general` or `pages` for text that comes with
    deltafold, `self` for text that the model writes, or samples as they are. At most `samples` samples
    of at most `max_tokens` tokens; `seed` draws them.
    """

    source: str | Path | Sequence[Sample]
    samples: int = 128
    max_tokens: int = 256
    seed: int = 0

    @property
    def name(self) -> str:
        """What a record calls it."""
        return str(self.source) if isinstance(self.source, str | Path) else "samples"


AnyText = Sampling | str | Path | Sequence[Sample]
"""A `Sampling`, or its source alone."""


def as_sampling(text: AnyText) -> Sampling:
    """A source alone is a `Sampling` of the usual size."""
    return text if isinstance(text, Sampling) else Sampling(text)


def gather_samples(
    finetuned: str | Path | StreamedModel,
    text: AnyText,
    *,
    memory_bytes: int | None = None,
    cache: str | Path | None = None,
    restart: bool = False,
) -> list[Sample]:
    """Samples of a text, by the fine-tune's tokenizer; samples as they are come back.

    What the fine-tune itself writes (`self`) is kept in `cache` and found again, unless `restart`.
    Raises DeltafoldError.

    >>> gather_samples("math/", Sampling("math.jsonl", samples=2))                  # doctest: +SKIP
    [Sample(ids=(504, 2365, ...), start=31), Sample(ids=(1780, ...), start=24)]
    """
    asked = as_sampling(text)
    source, samples, max_tokens, seed = asked.source, asked.samples, asked.max_tokens, asked.seed
    if not isinstance(source, str | Path):
        return list(source)
    check_limits(samples, max_tokens)
    model = finetuned if isinstance(finetuned, StreamedModel) else StreamedModel(finetuned)
    tokenizer = load_tokenizer(model.skeleton.folder)
    encoder = Encoder(tokenizer, min(max_tokens, model.context or max_tokens))
    if str(source) == GENERAL:
        return general_samples(encoder)
    if str(source) == PAGES:
        return page_samples(encoder, samples, seed)
    if str(source) != "self":
        return read_samples(source, encoder, samples, seed)
    wanted = [VERSION, model.checkpoint.fingerprint(), samples, encoder.max_tokens, seed]
    key = key_of(wanted + list(identity().values()))
    path = cache_folder(cache) / f"self-{key}.json"
    found = None if restart else read_samples_file(path)
    if found is None:
        allowance = memory_bytes or default_memory_bytes()
        found = write_texts(model, encoder, samples, seed, allowance)
        keep("The text", partial(write_samples, path, found))
    return found


def asked_samples(request: Any, model: StreamedModel, source: str | Path) -> list[Sample]:
    """As many samples of a text as a request says: a `Sampled` that is `Seeded` and `Tasked`."""
    text = Sampling(source, request.samples, request.max_tokens, request.seed)
    return gather_samples(model, text, memory_bytes=request.memory_bytes)
