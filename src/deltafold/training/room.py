"""How many tokens are run at a time, before their gradients are added up.

A CPU is as quick with a thousand as with more. A GPU is told of every small product on its own, so it
gets as many as its memory allows for what the backward pass needs again:

    bytes of a token = 34 x layers x width x (bytes of a number / 2) + 16 x vocabulary

The first is Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) without the scores of attention,
which are not kept; the second are logits of teacher and student, their gradient, and pieces in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

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
    total = torch.cuda.get_device_properties(device).total_memory
    return fitting(total // SHARE, each)


def fitting(room_bytes: int, token_bytes: float) -> int:
    """The largest power of two whose tokens fit, within bounds.

    >>> [fitting(room << 30, 1.5e6) for room in (1, 20, 1000)]
    [1024, 8192, 16384]
    """
    tokens = FORWARD_TOKENS
    while 2 * tokens <= MOST_TOKENS and 2 * tokens * token_bytes <= room_bytes:
        tokens *= 2
    return tokens
