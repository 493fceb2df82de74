"""How good predictions are on some samples, against the text and the whole model's own.

Also which samples are set apart to choose by, and which to judge by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from deltafold.calibration.batches import Batch, Sample, make_batches
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import Pass, StreamedModel

PROBE_TOKENS = 512
"""Tokens that the cost of an absence is measured on: it is measured many times."""
HELD_EVERY = 4
"""One sample in so many is held out: the ridge is chosen on it."""
JUDGE_EVERY = 9
"""One sample in so many is seen by nothing but a comparison of candidates."""
IN_A_ROW = 8
"""As many neighbours are set apart together, where there are enough."""


class Runnable(Protocol):
    """What can be run: a draft, or the same blocks with other tensors."""

    @property
    def numbers(self) -> list[int]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the checkpoint, in its stored shape."""
        ...


class Probe:
    """How good a draft's predictions are on some samples, against the text and the model's own."""

    def __init__(self, model: StreamedModel, whole: Runnable, samples: Sequence[Sample]):
        self.model = model
        self.batches = make_batches(samples)
        self._targets = torch.cat([_targets(batch) for batch in self.batches])
        self._norms: list[torch.Tensor] = []
        self._logits = self._learn(whole)

    def _learn(self, whole: Runnable) -> TensorStore:
        model = self.model.with_weights(whole.tensor)
        with model.forward(self.batches, blocks=whole.numbers) as done:
            shapes = [(len(rows), model.vocabulary) for _, rows in model.row_chunks(done)]
            store = TensorStore(shapes, model.memory_bytes, model.scratch)
            for place, (_, logits) in enumerate(model.logits(done)):
                store[place] = logits
                self._norms.append(store.near(place).logsumexp(-1))
        return store

    def close(self) -> None:
        """Free the model's logits."""
        self._logits.close()

    @property
    def tokens(self) -> int:
        return len(self._targets)

    def start(self, draft: Runnable) -> Pass:
        """The draft's states on these samples, kept, for `nll`, `kl` and `without`."""
        return self.model.with_weights(draft.tensor).forward(
            self.batches, keep=True, blocks=draft.numbers
        )

    def measure(self, draft: Runnable) -> dict[str, float]:
        """Perplexity, KL to the model in nats, and agreement with it, over all predictions."""
        model = self.model.with_weights(draft.tensor)
        with model.forward(self.batches, blocks=draft.numbers) as done:
            return self._measured(model, done)

    def measure_model(self, model: StreamedModel) -> dict[str, float]:
        """`measure` of another model, with all of its blocks."""
        with model.forward(self.batches) as done:
            return self._measured(model, done)

    def reached(self, draft: Runnable, started: Pass) -> dict[str, float]:
        """`measure` of the draft whose states are in `started`."""
        return self._measured(self.model.with_weights(draft.tensor), started)

    def without(
        self, draft: Runnable, started: Pass, positions: Collection[int]
    ) -> dict[str, float]:
        """`measure` of the draft without the blocks at some positions; `started` is its `start`."""
        model, first = self.model.with_weights(draft.tensor), min(positions)
        rest = [n for p, n in enumerate(draft.numbers) if p > first and p not in positions]
        with model.resume(started, first, rest) as done:
            return self._measured(model, done)

    def _measured(self, model: StreamedModel, done: Pass) -> dict[str, float]:
        nll = kl = 0.0
        agreed = 0
        for place, (start, logits) in enumerate(model.logits(done)):
            at = logits.device
            targets = self._targets[start : start + len(logits)].to(at)
            own, own_norm = self._logits.near(place).to(at), self._norms[place].to(at)
            norm = logits.logsumexp(-1)
            nll += float((norm - logits.gather(1, targets[:, None])[:, 0]).double().sum())
            # KL(p || q) = sum p (z - w) - norm(z) + norm(w); in fp32, as folds are never near zero.
            terms = torch.linalg.vecdot((own - own_norm[:, None]).exp_(), own - logits)
            kl += float((terms - own_norm + norm).double().clamp(min=0).sum())
            agreed += int((own.argmax(-1) == logits.argmax(-1)).sum())
        mean = nll / self.tokens
        return {
            "nll": mean,
            "perplexity": float(torch.tensor(mean, dtype=torch.float64).exp()),
            "kl": kl / self.tokens,
            "agreement": agreed / self.tokens,
        }


def _targets(batch: Batch) -> torch.Tensor:
    """The tokens (n,) that the counted predictions are of, in the order of `Pass.rows`."""
    return batch.ids.roll(-1, dims=1)[batch.counted]


def parted(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(samples to choose and heal by, samples to judge by): one in nine, some in a row, judges.

    Where there are few, all do both.
    """
    row = _in_a_row(len(samples), JUDGE_EVERY)
    judges = [n // row % JUDGE_EVERY == JUDGE_EVERY - 1 for n in range(len(samples))]
    if not any(judges):
        return list(samples), list(samples)
    return (
        [each for each, judge in zip(samples, judges, strict=True) if not judge],
        [each for each, judge in zip(samples, judges, strict=True) if judge],
    )


def is_held(number: int, total: int) -> bool:
    """True for the samples that are held out; none are where there are less than four."""
    row = _in_a_row(total, HELD_EVERY)
    return number // row % HELD_EVERY == HELD_EVERY - 1


def _in_a_row(total: int, every: int) -> int:
    """How many neighbours go together when one part in `every` is set apart.

    Neighbours may be pieces of one page: what was fitted to one piece does well on the next.
    """
    return max(1, min(IN_A_ROW, total // (2 * every)))


def few(samples: Sequence[Sample]) -> list[Sample]:
    """Some of the samples, evenly spread, with about PROBE_TOKENS tokens in all."""
    step = max(1, round(sum(len(each.ids) for each in samples) / PROBE_TOKENS))
    return list(samples[step // 2 :: step] or samples[:1])
