"""Text that the fine-tune writes itself, for when there is none to calibrate on.

Half of the samples go on from the start token; half, where the model has a chat template, from the
beginning of a user's turn: the model then writes a question, the template what stands between, and
the model its answer. Tokens are drawn at temperature 1. The draws are fixed by the seed, the number
of the sample and the number of the token:

    token = first v with  p(1) + ... + p(v) > u      u from the counter-based generator, in [0, 1)

Probabilities are counted in units of 2^-40: sums of whole numbers are the same in any order.

A model that fits the allowance writes with a cache of keys and values. A larger one runs block by
block over all that was written, once a token: exact, and slow.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltafold.calibration.batches import Sample, make_batches
from deltafold.calibration.models import load_weights
from deltafold.calibration.stream import StreamedModel
from deltafold.calibration.tokens import Encoder, end_ids
from deltafold.coding.counter import derive_key, random_u64
from deltafold.running.devices import fitting, total_bytes

WRITERS, MOST_WRITERS = 32, 2048
"""Samples written side by side on a CPU; on a GPU at most, where its memory allows it."""

UNITS = 2.0**40

Step = Callable[[list[list[int]]], torch.Tensor]
"""Rows of token ids, all of one length, one token longer than before -> logits (n, vocabulary)."""


@dataclass
class Text:
    """One sample while it is written."""

    ids: list[int]
    start: int
    draws: NDArray[np.float64]
    waiting: list[int] = field(default_factory=list)  # what the template says next
    after_turn: list[int] = field(default_factory=list)  # what it says once the question ends
    ended: bool = False

    def add(self, drawn: int, ends: Sequence[int]) -> None:
        """Go on by the drawn token, or by the next of the template's."""
        if self.waiting:
            self.ids.append(self.waiting.pop(0))
            return
        self.ids.append(drawn)
        if drawn not in ends:
            return
        # Templates close a turn with the very token at which the model stops.
        self.waiting = self.after_turn[self.after_turn[:1] == [drawn] :]
        self.ended, self.after_turn = not self.after_turn, []


def write_texts(
    model: StreamedModel, encoder: Encoder, samples: int, seed: int, memory_bytes: int
) -> list[Sample]:
    """`samples` texts of at most the encoder's `max_tokens`, the same for the same seed."""
    folder = model.skeleton.folder
    ends = end_ids(folder, encoder.tokenizer)
    length = min(encoder.max_tokens, model.context or encoder.max_tokens)
    texts = [_begin(encoder, ends, seed, number, length) for number in range(samples)]
    whole = _load(model) if _fits(model, memory_bytes) else None
    writers = WRITERS if whole is None else _writers(whole, length)
    by_start: dict[tuple[int, ...], list[Text]] = {}
    for text in texts:
        by_start.setdefault(tuple(text.ids), []).append(text)
    for alike in by_start.values():
        for first in range(0, len(alike), writers):
            step = _Cached(whole) if whole is not None else _streamed(model)
            _write(alike[first : first + writers], step, ends, length)
    del whole
    gc.collect()
    return [Sample(tuple(t.ids), min(t.start, len(t.ids) - 1)) for t in texts if len(t.ids) > 1]


def _begin(encoder: Encoder, ends: Sequence[int], seed: int, number: int, length: int) -> Text:
    key = derive_key(seed, "self-written text", str(number))
    draws = (random_u64(key, 0, length) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    turn = encoder.empty_turn()
    if turn is not None and number % 2:
        ids = encoder.beginning(turn[0])
        if len(ids) < length // 2:
            return Text(ids, len(ids), draws, after_turn=encoder.ids(turn[1]))
    token = encoder.tokenizer.bos_token_id
    start = [token] if token is not None else ends[:1] or [0]
    return Text(list(start), 1, draws)


@torch.no_grad()
def _write(texts: list[Text], step: Step, ends: Sequence[int], length: int) -> None:
    """Write all texts, token by token, side by side."""
    going = texts
    while going and len(going[0].ids) < length:
        logits = step([text.ids for text in going])
        at = len(going[0].ids)
        draws = torch.tensor(np.array([text.draws[at] for text in going]))
        for text, token in zip(going, pick(logits, draws), strict=True):
            text.add(token, ends)
        rows = [row for row, text in enumerate(going) if not text.ended]
        if isinstance(step, _Cached) and len(rows) < len(going):
            step.keep(rows)
        going = [going[row] for row in rows]


def pick(logits: torch.Tensor, draws: torch.Tensor) -> list[int]:
    """The token that each draw in [0, 1) falls on, from logits (n, vocabulary).

    >>> pick(torch.zeros(2, 4), torch.tensor([0.0, 0.6]))
    [0, 2]
    """
    sums = (logits.double().softmax(-1) * UNITS).round_().long().cumsum(-1)
    wanted = (draws.to(logits.device, torch.float64)[:, None] * sums[:, -1:]).long()
    found = torch.searchsorted(sums, wanted, right=True)
    return [int(token) for token in found[:, 0].clamp(max=logits.shape[1] - 1).tolist()]


def _fits(model: StreamedModel, memory_bytes: int) -> bool:
    """True if the whole model in fp32, and half as much again to work with, fits."""
    elements = sum(info.elements for info in model.checkpoint.tensors.values())
    return 6 * elements <= memory_bytes


def _load(model: StreamedModel) -> Any:
    skeleton, weights = model.skeleton, model.weights
    state = {name: weights(name) for name in model.checkpoint.own_tensors}
    loaded = load_weights(skeleton.model.config, state, str(skeleton.folder), dtype=skeleton.dtype)
    return loaded.to(model.skeleton.device).eval()


def _writers(whole: Any, length: int) -> int:
    """Samples side by side: on one kind of GPU always the same, since sums depend on it.

    Half of its memory may hold keys and values of all tokens, and logits with what is made of them.
    """
    device = whole.device
    if device.type != "cuda":
        return WRITERS
    config = whole.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * whole.dtype.itemsize
    each = length * token + 48 * config.vocab_size
    return fitting(total_bytes(device) // 2, each, WRITERS, MOST_WRITERS)


class _Cached:
    """Logits of the next token from a whole model and what it remembers of the tokens before."""

    def __init__(self, model: Any):
        self.model, self.memory = model, None

    def __call__(self, rows: list[list[int]]) -> torch.Tensor:
        fresh = rows if self.memory is None else [row[-1:] for row in rows]
        at = self.model.device
        made = self.model(
            input_ids=torch.tensor(fresh, device=at),
            attention_mask=torch.ones(len(rows), len(rows[0]), dtype=torch.long, device=at),
            past_key_values=self.memory,
            use_cache=True,
        )
        # A model without such a memory (a recurrent one) reads all of the text each time.
        self.memory = getattr(made, "past_key_values", None)
        return made.logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Forget the texts that have ended."""
        if self.memory is not None and rows:
            self.memory.batch_select_indices(torch.tensor(rows, device=self.model.device))


def _streamed(model: StreamedModel) -> Step:
    """Logits of the next token block by block, with no memory of the tokens before."""

    def step(rows: list[list[int]]) -> torch.Tensor:
        # The prediction after the last token counts, so a token that nobody reads follows it.
        batches = make_batches([Sample((*row, 0), len(row)) for row in rows])
        with model.forward(batches) as done:
            made = torch.cat([logits.cpu() for _, logits in model.logits(done)])
        order = [number for batch in batches for number in batch.numbers]
        return made[torch.tensor(order).argsort()]

    return step
