"""From texts to token ids, and from token ids to logits, in batches that fit in memory.

A segment is a row of tokens of which only the last ones are scored:

    | context: ids[:start] | targets: ids[start:], each scored given all before it |

Segments are padded on the right. Attention looks to the left only, so padding changes no logits of
a segment; the logits at padding are never read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltafold.calibration.tokens import TextIds
from deltafold.evaluation.data import TaskError

LOGITS_BYTES = 1 << 29
"""The logits of one batch of one model stay below this, unless one segment alone is above."""


@dataclass(frozen=True)
class Segment:
    """Token ids (t,); `ids[start:]` are scored, 1 <= start < t."""

    ids: tuple[int, ...]
    start: int

    @property
    def targets(self) -> tuple[int, ...]:
        return self.ids[self.start :]


@dataclass
class Subject:
    """A loaded causal language model and the name that it has in the table."""

    label: str
    model: Any

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class Encoder(TextIds):
    """The fine-tune's tokenizer, used for every model."""

    def segment(self, prompt: str, continuation: str, where: str) -> Segment:
        """The continuation scored after the prompt; `where` names the row in errors.

        The prompt's ids are those that generation starts from.
        """
        whole, start = self.followed(prompt, continuation)
        if start == 0 or len(whole) == start:
            part = "the prompt" if start == 0 else repr(continuation)
            raise TaskError(
                f"{where}: {part} becomes no tokens under the fine-tune's tokenizer; change it."
            )
        return Segment(tuple(whole), start)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def stream_logits(
    models: Sequence[Any], segments: Sequence[Segment], batch_size: int
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """For each segment: its index, and the logits (targets, vocabulary) of each of the models.

    Longest first, so that memory is at its highest at the start. All models see the same batches.
    """
    for batch in _batches(segments, batch_size, _bytes_per_position(models)):
        chosen = [segments[index] for index in batch]
        first = min(segment.start for segment in chosen) - 1
        logits = [_forward(model, chosen, first) for model in models]
        for row, (index, segment) in enumerate(zip(batch, chosen, strict=True)):
            scored = slice(segment.start - 1 - first, len(segment.ids) - 1 - first)
            yield index, [each[row, scored] for each in logits]


def _bytes_per_position(models: Sequence[Any]) -> int:
    sizes = [model.config.get_text_config().vocab_size * model.dtype.itemsize for model in models]
    return int(max(sizes))


def _batches(
    segments: Sequence[Segment], batch_size: int, bytes_per_position: int
) -> Iterator[list[int]]:
    """Indices of segments, longest first, as many as `batch_size` and `LOGITS_BYTES` allow."""
    batch: list[int] = []
    start = 0
    for index in sorted(range(len(segments)), key=lambda i: (-len(segments[i].ids), i)):
        start = min(start, segments[index].start) if batch else segments[index].start
        longest = len(segments[batch[0] if batch else index].ids)
        n_bytes = (len(batch) + 1) * (longest - start + 1) * bytes_per_position
        if batch and (len(batch) == batch_size or n_bytes > LOGITS_BYTES):
            yield batch
            batch, start = [], segments[index].start
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def _forward(model: Any, segments: Sequence[Segment], first: int) -> torch.Tensor:
    """Logits (b, t - first, vocabulary) at positions `first` and later of padded segments."""
    longest = max(len(segment.ids) for segment in segments)
    ids = torch.zeros(len(segments), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, segment in enumerate(segments):
        ids[row, : len(segment.ids)] = torch.tensor(segment.ids)
        mask[row, : len(segment.ids)] = 1
    device = next(model.parameters()).device
    keep = longest - first
    options: dict[str, Any] = {"use_cache": False}
    # Most heads can be asked for the last positions only: prompts are long, answers short.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
    return output.logits[:, -keep:]
