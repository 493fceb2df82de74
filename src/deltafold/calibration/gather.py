"""Samples for a model, from whatever source."""

from __future__ import annotations

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


def gather_samples(
    finetuned: str | Path | StreamedModel,
    source: str | Path,
    *,
    samples: int = 128,
    max_tokens: int = 256,
    seed: int = 0,
    memory_bytes: int | None = None,
    cache: str | Path | None = None,
    restart: bool = False,
) -> list[Sample]:
    """At most `samples` samples of at most `max_tokens` tokens, by the fine-tune's tokenizer.

    `source` is a file, `datasets:NAME[:SPLIT[:FIELD]]`, `general` or `pages` for text that comes
    with deltafold, or `self` for text that the fine-tune writes; that is kept in `cache` and found
    again. Raises DeltafoldError.

    >>> gather_samples("math/", "math.jsonl", samples=2)                        # doctest: +SKIP
    [Sample(ids=(504, 2365, ...), start=31), Sample(ids=(1780, ...), start=24)]
    """
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
    return gather_samples(
        model,
        source,
        samples=request.samples,
        max_tokens=request.max_tokens,
        seed=request.seed,
        memory_bytes=request.memory_bytes,
    )
