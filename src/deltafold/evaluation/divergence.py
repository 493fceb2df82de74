"""How far a model's predictions are from the fine-tune's, token by token, and the loss per token.

With p the fine-tune's and q the model's distribution over the next token, after the same context:

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))      in nats, >= 0, 0 only where q = p
    agreement  = [argmax_v p(v) = argmax_v q(v)]

The fine-tune and one other model stream through memory side by side; no logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltafold.errors import NonFiniteError
from deltafold.evaluation.estimate import Figure, ratio_of_sums
from deltafold.evaluation.segments import Segment, Subject, stream_logits

CHUNK_ELEMENTS = 1 << 23  # logits widened to float64 at a time, for each of the two models


@dataclass(frozen=True)
class Scores:
    """Sums over the targets of each segment (n,), float64; `kl` and `agreed` need a teacher."""

    tokens: torch.Tensor
    loss: torch.Tensor
    kl: torch.Tensor
    agreed: torch.Tensor

    def divergence(self) -> tuple[Figure, Figure]:
        """(KL per token in nats, share of tokens with the same top prediction).

        Both standard errors are over segments: tokens of one segment depend on one another.
        """
        return ratio_of_sums(self.kl, self.tokens), ratio_of_sums(self.agreed, self.tokens)


def score(
    student: Subject, segments: Sequence[Segment], batch_size: int, teacher: Subject | None = None
) -> Scores:
    """Score every target of every segment. Raises NonFiniteError when a model breaks down."""
    models = [student.model] if teacher is None else [student.model, teacher.model]
    tokens = torch.tensor([len(segment.targets) for segment in segments], dtype=torch.float64)
    loss, kl, agreed = (torch.zeros(len(segments), dtype=torch.float64) for _ in range(3))
    for index, logits in stream_logits(models, segments, batch_size):
        targets = torch.tensor(segments[index].targets, device=student.device)
        loss[index] = _loss_sum(logits[0], targets)
        if teacher is not None:
            kl[index], agreed[index] = _divergence_sums(logits[1], logits[0])
        if not (loss[index].isfinite() and kl[index].isfinite()):
            raise NonFiniteError(
                f"{student.label} gives NaN or infinite predictions; measure with --dtype fp32, "
                "and if that does not help its weights are damaged."
            )
    return Scores(tokens, loss, kl, agreed)


def _loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -log q(target) over logits (t, vocabulary) and targets (t,)."""
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return sum(
        float(torch.nn.functional.cross_entropy(rows.double(), part, reduction="sum"))
        for rows, part in zip(logits.split(step), targets.split(step), strict=True)
    )


def _divergence_sums(teacher: torch.Tensor, student: torch.Tensor) -> tuple[float, float]:
    """Sums of KL(teacher || student) and of agreements over logits (t, vocabulary) of each.

    Where one vocabulary has more rows (tokens added in fine-tuning), both are compared, and
    normalised, over the rows that they share.
    """
    shared = min(teacher.shape[-1], student.shape[-1])
    step = max(1, CHUNK_ELEMENTS // shared)
    kl, agreed = 0.0, 0.0
    for p_logits, q_logits in zip(teacher.split(step), student.split(step), strict=True):
        # float64: KL of a good codec is far below what rounding in fp32 would add.
        log_p = p_logits[:, :shared].double().log_softmax(-1)
        log_q = q_logits[:, :shared].double().log_softmax(-1)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # 0 log 0 = 0
        kl += float(terms.sum(-1).clamp(min=0).sum())  # rounding may reach -1e-16
        agreed += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return kl, agreed
