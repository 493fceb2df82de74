"""bf16 for text that only weighs: on a GPU, where the weights are bf16 and bf16 predicts the same.

What is summed over much text (moments of inputs, squares of gradients) hardly feels the 8 bits of
bf16, and a GPU runs it several times as fast. So before such a pass one sample is run in both, and
bf16 is taken if its predictions are as near to those of fp32 as `MOST_KL`. What compares models, or
fits and trains, always runs in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from deltafold.calibration.batches import Sample, make_batches
from deltafold.calibration.divergence import divergence_sums, norms
from deltafold.calibration.stream import StreamedModel
from deltafold.running.devices import place

MOST_KL = 0.01
"""Nats a token between predictions in fp32 and in bf16, on one sample."""


def settled(model: StreamedModel, samples: Sequence[Sample]) -> StreamedModel:
    """The model, computing in bf16 where that is allowed, worth it and near enough to fp32.

    What was found goes into the record. Raises NonFiniteError, MismatchError.
    """
    here = place()
    if not here.text_bf16 or not samples or not _is_bf16(model):
        return model
    quick = model.in_dtype(torch.bfloat16)
    kl = _distance(model, quick, max(samples, key=lambda sample: len(sample.ids)))
    near = kl <= MOST_KL
    here.note("text", {"dtype": "bf16" if near else "fp32", "kl_of_bf16": kl, "at_most": MOST_KL})
    return quick if near else model


def _is_bf16(model: StreamedModel) -> bool:
    """True if most values of the checkpoint are bf16."""
    sizes = [(info.dtype == "BF16", info.elements) for info in model.checkpoint.tensors.values()]
    return 2 * sum(n for short, n in sizes if short) > sum(n for _, n in sizes)


def _distance(model: StreamedModel, quick: StreamedModel, sample: Sample) -> float:
    """Mean KL in nats from the model's predictions to those of `quick`, over one sample."""
    batches = make_batches([Sample(sample.ids)])
    total, rows = 0.0, 0
    with contextlib.ExitStack() as stack:
        passes = [(each, stack.enter_context(each.forward(batches))) for each in (model, quick)]
        # One head after the other: the two share their modules.
        exact = [logits.float().cpu() for _, logits in model.logits(passes[0][1])]
        for logits, (_, other) in zip(exact, quick.logits(passes[1][1]), strict=True):
            total += divergence_sums(logits, norms(logits), other.float().cpu())[0]
            rows += len(logits)
    return total / rows
