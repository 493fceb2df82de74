"""A model run block by block: one block's weights in memory at a time.

    ids -> outside -> hidden states -> block 0 -> block 1 -> ... -> outside -> logits
           all batches  in a store     all batches                  a few rows at a time

Memory holds one block (or the embedding, or the head), one batch, and hidden states as far as an
allowance goes; the rest of them lie in a file. An architecture needs no code here, as long as its
blocks hand on nothing but hidden states; that is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from deltafold.calibration.batches import Batch
from deltafold.calibration.calls import Call, Forward, Interned
from deltafold.calibration.skeleton import Skeleton
from deltafold.calibration.store import TensorStore
from deltafold.calibration.wiring import Weights
from deltafold.checkpoint import Checkpoint, open_checkpoint
from deltafold.errors import MismatchError, NonFiniteError
from deltafold.linalg.matrices import products
from deltafold.running.devices import here, put
from deltafold.running.engine import spread, trim
from deltafold.running.memory import total_memory_bytes

LOGITS_BYTES = 1 << 25
"""Logits made at a time stay below this."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Last hidden states (n, width), before the last norm -> logits (n, vocabulary)."""


class Visitor(Protocol):
    """What wants to see blocks at work."""

    def running(
        self, number: int, parameters: dict[str, nn.Parameter]
    ) -> contextlib.AbstractContextManager[object]:
        """A context in which block `number` is run on one batch."""

    def finished(self, number: int) -> None:
        """All batches have gone through block `number`."""


def is_bf16(checkpoint: Checkpoint) -> bool:
    """True if every matrix is stored in bf16."""
    return all(info.dtype == "BF16" for info in checkpoint.tensors.values() if len(info.shape) > 1)


def multiplies_bf16(device: torch.device) -> bool:
    """True for a processor that is built for products in bf16, and so faster than in fp32."""
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def default_memory_bytes() -> int:
    """A quarter of the machine."""
    return total_memory_bytes() // 4


@dataclass
class Pass:
    """What a forward pass leaves: the last hidden states, and with `keep` each block's inputs.

    With `keep`, `stores[n]` holds the inputs (b, t, width) of block n by batch; the last store is
    always what comes out of the last block. Use as a context manager, or call `close`.
    """

    batches: list[Batch]
    calls: list[list[Call]]
    stores: list[TensorStore]

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free memory and files."""
        for store in self.stores:
            store.close()

    @property
    def last(self) -> TensorStore:
        """What comes out of the last block, before the last norm."""
        return self.stores[-1]

    def rows(self, number: int) -> torch.Tensor:
        """Last hidden states (n, width) of one batch where predictions count."""
        return self.last.near(number)[self.batches[number].counted]


class _Caught(BaseException):
    """Ends a head's forward once its projection has been given its inputs."""


class StreamedModel:
    """A causal language model that is never in memory as a whole.

    It computes on `device`, by default where heavy steps do (`running/devices.py`).
    `source` is a folder, a hub id or an open checkpoint. `weights` gives other tensors under the
    same names: those of a candidate. `memory_bytes` is for hidden states; what exceeds it goes to a
    file in `scratch`. `mixed`: blocks and head multiply in bf16, on a processor that is built for it,
    if the model is stored in bf16; sums, hidden states, norms and logits stay in `dtype`. Raises
    CheckpointError, MismatchError.

    >>> model = StreamedModel("llama/")                                         # doctest: +SKIP
    >>> with model.forward(make_batches(samples)) as done:                      # doctest: +SKIP
    ...     logits = torch.cat([each for _, each in model.logits(done)])
    """

    def __init__(
        self,
        source: str | Path | Checkpoint,
        weights: Weights | None = None,
        *,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
        memory_bytes: int | None = None,
        scratch: Path | None = None,
        mixed: bool = False,
    ):
        self.checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        self.label = self.checkpoint.label
        self.weights = weights or self.checkpoint.tensor
        self.skeleton = Skeleton(
            folder or self.checkpoint.path,
            self.checkpoint.own_tensors,
            dtype,
            device or str(here()),
        )
        self.entry = Forward(self.skeleton, self.checkpoint.label)
        self.memory_bytes = memory_bytes or default_memory_bytes()
        self.scratch = scratch
        self.mixed = mixed and is_bf16(self.checkpoint) and multiplies_bf16(self.skeleton.device)

    def in_dtype(self, dtype: torch.dtype) -> StreamedModel:
        """The same model computing in another dtype; the two share modules, too."""
        other = copy(self)
        other.skeleton = copy(self.skeleton)
        other.skeleton.dtype = dtype
        other.entry = Forward(other.skeleton, self.checkpoint.label)
        return other

    def with_weights(self, weights: Weights) -> StreamedModel:
        """The same model with other weights; the two share modules, so one runs at a time."""
        other = copy(self)
        other.weights, other.label = weights, f"A candidate for {self.label}"
        return other

    def exact(self) -> StreamedModel:
        """The same model without products in bf16."""
        other = copy(self)
        other.mixed = False
        return other

    @property
    def n_blocks(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def vocabulary(self) -> int:
        """Number of logits a token."""
        return int(self.skeleton.model.config.get_text_config(decoder=True).vocab_size)

    @property
    def context(self) -> int | None:
        """The most tokens of a sample; None where the config names no bound."""
        config = self.skeleton.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, of any shape, where, and as, the model computes."""
        if tensor.device == self.skeleton.device or self.skeleton.device != here():
            return tensor.to(self.skeleton.device, self.skeleton.dtype)
        return put(tensor, self.skeleton.dtype)

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[Batch],
        *,
        keep: bool = False,
        visitor: Visitor | None = None,
        blocks: Sequence[int] | None = None,
    ) -> Pass:
        """Run all batches through all blocks; with `keep` every block's inputs are kept.

        `blocks` are the numbers of those that run, in order; the others are left out. Raises
        MismatchError where samples do not suit the model, or it cannot be run like this.
        """
        numbers = range(self.n_blocks) if blocks is None else blocks
        done = self._embed(list(batches))
        return self._through(done, done.last, numbers, keep, visitor)

    @torch.no_grad()
    def resume(
        self, done: Pass, place: int, blocks: Sequence[int], visitor: Visitor | None = None
    ) -> Pass:
        """A pass of its own that goes on from `done.stores[place]` through the numbered blocks.

        `done` stays as it is; close both.
        """
        source = done.stores[place]
        made = Pass(done.batches, done.calls, [self.store_beside(done)])
        if not blocks:
            for number in range(len(source)):
                made.last[number] = source[number]
        return self._through(made, source, blocks, False, visitor)

    def _through(
        self,
        done: Pass,
        source: TensorStore,
        numbers: Sequence[int],
        keep: bool,
        visitor: Visitor | None,
    ) -> Pass:
        try:
            for number in numbers:
                if keep:
                    done.stores.append(self.store_beside(done))
                self._run_block(done, number, source, visitor)
                source = done.last
        except BaseException:
            done.close()
            raise
        return done

    def _run_block(
        self, done: Pass, number: int, source: TensorStore, visitor: Visitor | None
    ) -> None:
        block, names = self.skeleton.blocks[number], self.skeleton.block(number)
        with self.skeleton.filled(names, self.weights) as parameters:

            def one(place: int) -> None:
                watched = visitor.running(number, parameters) if visitor else None
                with torch.no_grad(), watched or contextlib.nullcontext():
                    made = self.run(done.calls[place][number], block, source.near(place))
                done.last[place] = made

            # Products in bf16 differ by the number of threads, enough to change what is chosen.
            if self.mixed and visitor is None:
                spread(one, len(done.batches))
            else:
                for place in range(len(done.batches)):
                    one(place)
        trim()
        if visitor:
            visitor.finished(number)

    def run(self, call: Call, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """A filled block's new hidden states (b, t, width). Raises MismatchError."""
        in_bf16 = torch.autocast("cpu", torch.bfloat16) if self.mixed else contextlib.nullcontext()
        with self.entry.sentence(), in_bf16:
            return call.run(block, self.moved(hidden)).to(self.skeleton.dtype)

    def store_beside(self, done: Pass) -> TensorStore:
        """A store for one more set of hidden states, in what is left of the allowance."""
        held = sum(store.held_bytes for store in done.stores)
        return TensorStore(done.stores[0].shapes, self.memory_bytes - held, self.scratch)

    def _embed(self, batches: list[Batch]) -> Pass:
        """Embeddings of all batches, and how each block is called for each batch."""
        self._check_ids(batches)
        kept, calls = Interned(), []
        with self.skeleton.filled(self.skeleton.outside(), self.weights):
            self.entry.probe()
            shapes = [(*batch.ids.shape, self.entry.width) for batch in batches]
            store = TensorStore(shapes, self.memory_bytes, self.scratch)
            for place, batch in enumerate(batches):
                store[place], noted = self.entry.note(batch.ids)
                calls.append([kept(call) for call in noted])
        return Pass(batches, calls, [store])

    def _check_ids(self, batches: Sequence[Batch]) -> None:
        if not batches:
            raise MismatchError("There are no samples to run through the model; give some text.")
        limit = self.context
        longest = max(batch.ids.shape[1] for batch in batches)
        if limit and longest > limit:
            raise MismatchError(
                f"{self.checkpoint.label} takes at most {limit:,} tokens, but a sample has "
                f"{longest:,}; give shorter samples."
            )
        highest = max(int(batch.ids.max()) for batch in batches)
        if highest >= self.vocabulary:
            raise MismatchError(
                f"{self.checkpoint.label} has {self.vocabulary:,} vocabulary entries, but the "
                f"samples hold token {highest:,}; its tokenizer and weights do not belong together."
            )

    @contextlib.contextmanager
    def head(self, grad: Collection[str] = ()) -> Iterator[tuple[Head, dict[str, nn.Parameter]]]:
        """The model's own head with its weights, after a forward pass; and its parameters.

        Those in `grad` collect gradients.
        """
        names = self.entry.head_names(self.weights)
        with self.skeleton.filled(names, self.weights, grad) as parameters:
            yield lambda rows: self.entry.logits(self.moved(rows)), parameters

    @contextlib.contextmanager
    def last_norm(self) -> Iterator[Head]:
        """What the model does to its last hidden states (n, width) before they become logits."""
        projection = self.skeleton.model.get_output_embeddings()
        caught: list[torch.Tensor] = []

        def catch(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            caught.append(given[0])
            raise _Caught  # the product with the vocabulary is the larger part of the work

        with self.head() as (head, _):

            def normed(rows: torch.Tensor) -> torch.Tensor:
                with contextlib.suppress(_Caught):
                    head(rows)
                return caught.pop().reshape(len(rows), -1) if caught else rows

            hook = None if projection is None else projection.register_forward_pre_hook(catch)
            try:
                yield normed
            finally:
                if hook is not None:
                    hook.remove()

    @torch.no_grad()
    def logits(self, done: Pass) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, logits (n, vocabulary)) of all predictions that count, in order of batches.

        Raises NonFiniteError where weights give NaN or infinity.
        """
        with self.head() as (head, _):
            for start, rows in self.row_chunks(done):
                with products("medium") if self.mixed else contextlib.nullcontext():
                    made = head(rows)
                if not made.isfinite().all():
                    raise NonFiniteError(
                        f"{self.label} gives NaN or infinite predictions; its weights are damaged."
                    )
                yield start, made

    def row_chunks(self, done: Pass) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, last hidden states (n, width)) where predictions count, a few at a time."""
        row = 0
        for place in range(len(done.batches)):
            rows = done.rows(place)
            for start, part in self.parts(rows):
                yield row + start, part
            row += len(rows)

    def parts(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, some rows of (n, width)): as many as logits may be made of at a time."""
        step = max(1, LOGITS_BYTES // (4 * self.vocabulary))
        for start in range(0, len(rows), step):
            yield start, rows[start : start + step]
