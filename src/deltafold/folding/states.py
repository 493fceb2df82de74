"""Text run through a draft: states for similarities, and how good its predictions are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from deltafold.calibration.batches import Sample, make_batches
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass, StreamedModel
from deltafold.folding.methods.draft import Draft
from deltafold.folding.methods.similarity import Similarity
from deltafold.folding.request import Pool
from deltafold.running.engine import one_core_each

ROWS = 256
"""Rows that a manifold or a kernel wants. Where there are fewer samples each gives several."""


class States:
    """A model, its calibration samples in batches, and passes of drafts over them."""

    def __init__(self, model: StreamedModel, samples: Sequence[Sample]):
        self.model, self.samples = model, list(samples)
        self.batches = make_batches(samples)
        self._whole: Pass | None = None

    def close(self) -> None:
        """Free the model's states."""
        if self._whole is not None:
            self._whole.close()
            self._whole = None

    def whole(self, draft: Draft) -> Pass:
        """The unfolded model's states: run once, kept until `close`."""
        if self._whole is None:
            model = Draft.of(draft.layout, draft.source)
            self._whole = self.model.forward(self.batches, keep=True, blocks=model.numbers)
        return self._whole

    @contextlib.contextmanager
    def run(self, draft: Draft) -> Iterator[Pass]:
        """The draft's states: `stores[p]` is what enters its block at place p.

        As far as its first blocks are the model's own, so are their states.
        """
        whole = self.whole(draft)
        same = 0
        while same < len(draft) and draft.blocks[same].number == same:
            if draft.blocks[same].changed:
                break
            same += 1
        if same == draft.layout.depth:
            yield whole
            return
        made: list[TensorStore] = []
        try:
            entering = Pass(whole.batches, whole.calls, whole.stores[: same + 1])
            model = self.model.with_weights(draft.tensor)
            for number in draft.numbers[same:]:
                made.append(model.resume(entering, -1, [number]).last)
                entering = Pass(whole.batches, whole.calls, [*entering.stores, made[-1]])
            yield entering
        finally:
            for store in made:
                store.close()

    def matrix(self, similarity: Similarity, done: Pass, pool: Pool) -> torch.Tensor:
        """A (s, s) over the states of a pass with `keep`, the same whatever the number of cores."""
        with one_core_each():
            return self._matrix(similarity, done, pool)

    def _matrix(self, similarity: Similarity, done: Pass, pool: Pool) -> torch.Tensor:
        if similarity.rows == "samples":
            return similarity.matrix(pooled_rows(done, pool))
        total, count = torch.zeros(len(done.stores), len(done.stores), dtype=torch.float64), 0
        for place, batch in enumerate(done.batches):
            held = [store[place] for store in done.stores]
            for row, length in enumerate(batch.lengths):
                states = torch.stack([each[row, :length] for each in held])
                total += length * similarity.matrix(states)
                count += length
        return total / count


def pooled_rows(done: Pass, pool: Pool, wanted: int = ROWS) -> torch.Tensor:
    """States (s, n, w) at the last real token of each sample, or means over its real tokens.

    Fewer samples than `wanted`: each is cut into as many stretches as are needed, and gives the
    last token, or the mean, of each. Samples stand in their own order, whatever the batches.
    """
    total = sum(len(batch.lengths) for batch in done.batches)
    pieces = max(1, -(-wanted // total))
    by_sample: dict[int, torch.Tensor] = {}
    for place, batch in enumerate(done.batches):
        held = [store[place] for store in done.stores]
        for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
            states = torch.stack([each[row, :length] for each in held])
            by_sample[number] = _stretches(states, min(pieces, length), pool)
    return torch.cat([by_sample[number] for number in sorted(by_sample)], dim=1)


def _stretches(states: torch.Tensor, pieces: int, pool: Pool) -> torch.Tensor:
    """States (s, t, w) -> (s, pieces, w): stretches of the tokens, the last one ending them."""
    length = states.shape[1]
    ends = [length * (number + 1) // pieces for number in range(pieces)]
    if pool == "last":
        return states[:, torch.tensor(ends) - 1]
    starts = [0, *ends[:-1]]
    means = [states[:, a:b].mean(1) for a, b in zip(starts, ends, strict=True)]
    return torch.stack(means, dim=1)
