"""What a tensor is, told from its name alone: role, block index.

Works on checkpoint tensor names, so that a new architecture needs no code. The patterns cover the
naming of the Llama, Qwen, Gemma, Phi, Mistral, Mixtral, GPT-2, GPT-NeoX, OPT, Falcon and T5
families; a name that fits none gets the role `other`, which is treated by its shape like any
projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Role = Literal["embedding", "head", "norm", "bias", "attention", "mlp", "expert", "router", "other"]

ROLES: tuple[Role, ...] = (
    "embedding", "head", "attention", "mlp", "expert", "router", "norm", "bias", "other",
)  # fmt: skip

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")

# Order matters: the first pattern that is found decides.
_ROLE_PATTERNS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (
        "norm",
        re.compile(
            r"(norm|ln_|layernorm|ln\d|\.ln\.)[^.]*\.?(weight|bias)?$|norm\d?\.(?!(.*\.)?(linear|proj|emb))",
            re.I,
        ),
    ),
    ("bias", re.compile(r"(^|[._])bias$")),
    ("embedding", re.compile(r"(embed|\bwte\b|\bwpe\b|\bshared\.weight$|word_embeddings)", re.I)),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output_layer|score|classifier)\b", re.I)),
    ("router", re.compile(r"(router|(moe|mlp|feed_forward|sparse_moe)\.gate\.weight$)", re.I)),
    ("expert", re.compile(r"experts?\b", re.I)),
    ("attention", re.compile(r"(attn|attention|[qkvo]_proj|query|key_value|c_attn)", re.I)),
    (
        "mlp",
        re.compile(r"(mlp|ffn|feed_forward|gate_proj|up_proj|down_proj|fc\d|dense|c_fc)", re.I),
    ),
)


# What scales and offsets of quantised weights are called, wherever they lie.
_QUANTISATION = re.compile(
    r"(^|[._])(scales?|scale_inv|absmax|q?zeros|zero_points?|quant_map|scb)$", re.I
)


def quantisation(names: Iterable[str], packed: Iterable[str]) -> frozenset[str]:
    """Those of `names` that belong to quantised weights: scales, offsets, codebooks, tables.

    `packed` are the tensors of integers and 8-bit floats. What lies in the module of one of them
    (`q_proj.scales` beside `q_proj.qweight`), or under its name (`q_proj.weight.absmax`), says what
    its codes mean.

    >>> names = ["x.qweight", "x.scales", "x.norm.weight", "y.weight", "y.weight_scale_inv"]
    >>> sorted(quantisation(names, ["x.qweight"]))
    ['x.qweight', 'x.scales', 'y.weight_scale_inv']
    """
    packed = set(packed)
    modules = {name.rpartition(".")[0] for name in packed} - {""} | packed
    return frozenset(
        name for name in names if name.rpartition(".")[0] in modules or _QUANTISATION.search(name)
    )


def block_of(name: str) -> int | None:
    """Index of the transformer block that a tensor belongs to, or None.

    >>> block_of("model.layers.11.mlp.up_proj.weight")
    11
    """
    found = _BLOCK.search(name)
    return int(found.group(1)) if found else None


def role_of(name: str) -> Role:
    """Role of a tensor by its name.

    >>> role_of("model.layers.0.self_attn.q_proj.weight"), role_of("transformer.wte.weight")
    ('attention', 'embedding')
    >>> role_of("blocks.0.norm1.weight"), role_of("blocks.0.norm1.linear.weight")  # an adaptive norm's
    ('norm', 'other')
    """
    for role, pattern in _ROLE_PATTERNS:
        if pattern.search(name):
            return role
    return "other"


def is_vocabulary(name: str) -> bool:
    """True if the rows of the tensor are vocabulary entries, so that fine-tuning may add rows."""
    return role_of(name) in ("embedding", "head")
