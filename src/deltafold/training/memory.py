"""How many tokens are run at a time, before their gradients are added up.

A CPU is as quick with a thousand as with more. On a GPU each small product has to be started on its
own, so it gets as many as its memory allows for what the backward pass needs again:

    bytes of a token = 34 x layers x width x (bytes of a number / 2) + 16 x vocabulary

The first is Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) without the scores of attention,
which are not kept; the second are logits of teacher and student, their gradient, and pieces in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from deltafold.running.devices import fitting, total_bytes
from deltafold.training.loop import FORWARD_TOKENS

MOST_TOKENS = 16_384
SHARE = 4
"""One part in so many of a GPU's memory; the rest holds two models, masters and moments."""


def forward_tokens(model: Any, device: torch.device) -> int:
    """Tokens of a forward pass in training; on one kind of GPU always the same."""
    if device.type != "cuda":
        return FORWARD_TOKENS
    config = model.config.get_text_config()
    number = next(model.parameters()).element_size() / 2
    layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    each = 34 * layers * width * number + 16 * int(config.vocab_size)
    return fitting(total_bytes(device) // SHARE, each, FORWARD_TOKENS, MOST_TOKENS)
