"""How far a candidate's predictions are from the fine-tune's, block by block.

With p the fine-tune's and q the candidate's distribution over the next token:

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))      in nats, >= 0, 0 only where q = p
    agreement  = [argmax_v p(v) = argmax_v q(v)]

The fine-tune's logits are computed once and kept, in memory or in a file; each candidate then costs
one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deltafold.calibration.batches import Sample, make_batches
from deltafold.calibration.store import TensorStore
from deltafold.calibration.stream import StreamedModel, default_memory_bytes
from deltafold.calibration.wiring import Weights
from deltafold.checkpoint import Checkpoint, open_checkpoint

CHUNK_ELEMENTS = 1 << 19  # logits widened to float64 at a time: few enough to stay in caches


@dataclass(frozen=True)
class Divergence:
    """Means over the predictions that count; `kl` in nats."""

    kl: float
    agreement: float
    tokens: int


class Judge:
    """Compares candidates with the fine-tune on the same samples.

    `base` is for `base_weights` only. A candidate is a function from a checkpoint tensor's name to
    a tensor of the fine-tune's shape. Half of `memory_bytes` is for hidden states, half for the
    fine-tune's logits. Close it, or use it as a context manager.

    >>> with Judge("math/", "llama/", samples) as judge:                        # doctest: +SKIP
    ...     judge.kl(judge.base_weights)
    0.87
    """

    def __init__(
        self,
        finetuned: str | Path | StreamedModel,
        base: str | Path | Checkpoint | None,
        samples: Sequence[Sample],
        memory_bytes: int | None = None,
        scratch: Path | None = None,
    ):
        allowance = memory_bytes or default_memory_bytes()
        self.model = (
            finetuned
            if isinstance(finetuned, StreamedModel)
            else StreamedModel(finetuned, memory_bytes=allowance // 2, scratch=scratch)
        )
        self._base = base
        self.batches = make_batches(samples)
        self._norms: list[torch.Tensor] = []
        self._teacher = self._teach(allowance // 2)

    def _teach(self, allowance_bytes: int) -> TensorStore:
        with self.model.forward(self.batches) as done:
            sizes = [len(rows) for _, rows in self.model.row_chunks(done)]
            shapes = [(size, self.model.vocabulary) for size in sizes]
            store = TensorStore(shapes, allowance_bytes, self.model.scratch)
            for place, (_, logits) in enumerate(self.model.logits(done)):
                store[place] = logits
                self._norms.append(norms(store.near(place)))
        return store

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the fine-tune's logits."""
        self._teacher.close()

    @property
    def tokens(self) -> int:
        """Number of predictions that count."""
        return sum(shape[0] for shape in self._teacher.shapes)

    def teacher_logits(self, start: int, stop: int) -> torch.Tensor:
        """The fine-tune's logits (n, vocabulary) of rows [start, stop), numbered as in `backward`.

        Raises ValueError for rows that are not there.
        """
        found, first = [], 0
        for place, (rows, _) in enumerate(self._teacher.shapes):
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                found.append(self._teacher[place][low - first : high - first])
            first += rows
        if not 0 <= start < stop <= first:
            raise ValueError(f"there are {first} rows, not {start} to {stop}")
        return torch.cat(found)

    def kl(self, weights: Weights) -> float:
        """Mean KL from the fine-tune in nats. Raises NonFiniteError, MismatchError."""
        return self.compare(weights).kl

    def compare(self, weights: Weights) -> Divergence:
        """KL and agreement of a candidate. Raises NonFiniteError, MismatchError."""
        candidate = self.model.with_weights(weights)
        kl, agreed = 0.0, 0
        with candidate.forward(self.batches) as done:
            for place, (_, logits) in enumerate(candidate.logits(done)):
                at = logits.device
                teacher, norm = self._teacher.near(place).to(at), self._norms[place].to(at)
                sums = divergence_sums(teacher, norm, logits)
                kl, agreed = kl + sums[0], agreed + sums[1]
        return Divergence(kl / self.tokens, agreed / self.tokens, self.tokens)

    def base_weights(self, name: str) -> torch.Tensor:
        """The base's tensors, as a candidate that stores nothing but what the base cannot have.

        A tensor that only the fine-tune has is the fine-tune's, and so are rows of new vocabulary: all
        have their shapes in the fine-tune.
        """
        if self._base is None:
            raise ValueError("the judge was given no base")
        if not isinstance(self._base, Checkpoint):
            self._base = open_checkpoint(self._base)
        tuned = self.model.checkpoint.tensors[name]
        info = self._base.tensors.get(name)
        if info is not None and info.shape == tuned.shape:
            return self._base.tensor(name)
        whole = self.model.checkpoint.tensor(name)
        if info is not None and info.shape[1:] == tuned.shape[1:]:
            shared = min(info.shape[0], tuned.shape[0])
            rows = self._base.rows(name, 0, shared) if len(info.shape) == 2 else None
            if rows is not None:
                whole[:shared] = rows.to(whole.dtype)
        return whole


def norms(logits: torch.Tensor) -> torch.Tensor:
    """log sum_v exp(z(v)) of logits z (n, vocabulary), float64."""
    return torch.cat([rows.double().logsumexp(-1) for rows in logits.split(_step(logits))])


def divergence_sums(
    teacher: torch.Tensor, teacher_norms: torch.Tensor, student: torch.Tensor
) -> tuple[float, int]:
    """Sums of KL(teacher || student) and of agreements over logits (n, vocabulary) of each.

    With z and w the logits, KL = sum_v p(v) (z(v) - w(v)) - norm(z) + norm(w).
    """
    kl, agreed, step = 0.0, 0, _step(teacher)
    parts = (each.split(step) for each in (teacher, teacher_norms, student))
    for p_logits, norm, q_logits in zip(*parts, strict=True):
        # float64: KL of a good codec is far below what rounding in fp32 would add.
        p, q = p_logits.double(), q_logits.double()
        gaps, q_norm = p - q, q.logsumexp(-1)
        p = p.sub_(norm[:, None]).exp_()
        terms = torch.linalg.vecdot(p, gaps) - norm + q_norm
        kl += float(terms.clamp(min=0).sum())  # rounding may reach -1e-14
        agreed += int((p_logits.argmax(-1) == q_logits.argmax(-1)).sum())
    return kl, agreed


def _step(logits: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits.shape[-1])
