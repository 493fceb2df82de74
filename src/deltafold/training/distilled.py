"""The loss over the vocabulary, a few tokens at a time, its gradient made on the way.

    loss  (1 - a) CE(text, q) + a t^2 KL(p_t || q_t)
    d loss / d logits  (1 - a) (q - one-hot(text)) + a t (q_t - p_t)

A vocabulary of 50,000 makes fp32 logits of 1,000 tokens 200 MB, and plain autograd keeps several such
tensors. Here a piece of them is made in fp32, read, and left; only the gradient is kept, in the
logits' own dtype.
"""

from __future__ import annotations

from typing import Any

import torch

PIECE_NUMBERS, PIECE_NUMBERS_GPU = 1 << 22, 1 << 26
"""Logits in a piece: 16 MB in fp32, which an allocator gives again instead of asking for new pages.
On a GPU it takes as long to start a small piece as a large one."""


def distilled(
    logits: torch.Tensor,
    teacher: torch.Tensor | None,
    places: torch.Tensor,
    next_ids: torch.Tensor,
    kl_share: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, CE, KL) summed over some tokens; `logits` and `teacher` are (tokens, vocabulary).

    `places` (n,) are rows of both, no row twice, and `next_ids` (n,) what follows there. Only the
    loss is differentiable. CE and KL are fp64. Without a teacher KL is 0.
    """
    loss, ce, kl = _Distilled.apply(logits, teacher, places, next_ids, kl_share, temperature)
    return loss, ce, kl


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        teacher: torch.Tensor | None,
        places: torch.Tensor,
        next_ids: torch.Tensor,
        a: float,
        t: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits) if wanted else None
        sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
        most = PIECE_NUMBERS if logits.device.type == "cpu" else PIECE_NUMBERS_GPU
        each = max(1, most // logits.shape[1])
        for first in range(0, len(places), each):
            at = places[first : first + each]
            p = None if teacher is None else teacher[at]
            made, ce, kl = _piece(logits[at], p, next_ids[first : first + each], a, t, wanted)
            sums += torch.stack([ce, kl])
            if gradient is not None and made is not None:
                gradient[at] = made.to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ce, kl = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(ce, kl)
        return (1 - a) * ce + a * t * t * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor, *unused: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None, None


def _piece(
    logits: torch.Tensor,
    teacher: torch.Tensor | None,
    next_ids: torch.Tensor,
    a: float,
    t: float,
    wanted: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(gradient if wanted, CE, KL) of a few tokens."""
    log_q = logits.float().log_softmax(-1)
    at = next_ids[:, None]
    ce = -log_q.gather(1, at).double().sum()
    kl = torch.zeros((), dtype=torch.float64, device=logits.device)
    log_q_t = p_t = None
    if teacher is not None:
        log_q_t = log_q if t == 1 else (log_q / t).log_softmax(-1)
        log_p_t = (teacher.float() / t).log_softmax(-1)
        p_t = log_p_t.exp()
        kl = log_p_t.sub_(log_q_t).mul_(p_t).sum(-1).double().sum()
    if not wanted:
        return None, ce, kl
    if log_q_t is None or p_t is None or a == 0:
        gradient = log_q.exp_().mul_(1 - a)
    elif t == 1:
        gradient = log_q.exp_().sub_(p_t, alpha=a)
    else:
        gradient = log_q_t.exp_().sub_(p_t).mul_(a * t).add_(log_q.exp_(), alpha=1 - a)
    gradient.scatter_add_(1, at, gradient.new_full(at.shape, a - 1))
    return gradient, ce, kl
