"""Tiny models of any architecture: configs shrunk by the names of their sizes, weights at random.

A config of transformers names its sizes in one of a few dozen ways; each takes those of `SIZES` that it
knows, and so does each config inside it. What only one family has stands in the table of architectures.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from architectures import Architecture

DEPTH = 4
VOCABULARY = 160
SIZES: dict[str, Any] = {
    # width
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "hidden_dim": 96,
    "embedding_size": 64, "word_embed_proj_dim": 64, "projection_dim": 32, "out_hidden_size": 64,
    "text_embed_dim": 64, "attention_hidden_size": 64,
    # neurons
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "d_ff": 96, "ffn_hidden_size": 96,
    "mlp_dim": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "intermediate_size_mlp": 96,
    "shared_intermediate_size": 64, "decoder_intermediate_size": 96, "vision_intermediate_size": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    # depth
    "num_hidden_layers": DEPTH, "n_layer": DEPTH, "n_layers": DEPTH, "num_layers": DEPTH,
    "encoder_layers": DEPTH, "decoder_layers": DEPTH, "num_decoder_layers": DEPTH,
    "num_encoder_layers": DEPTH, "num_blocks": DEPTH, "depth": DEPTH,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "rotary_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "interleave_moe_layer_step": 1, "moe_num_experts": 4, "moe_k": 2,
    # state spaces
    "state_size": 16, "mamba_d_state": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_expand": 1,
    # lengths and windows
    "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 16, "attention_window": 16,
    "attention_chunk_size": 16, "window_size": 16, "local_attention": 16, "max_seq_len": 128,
    # words
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "type_vocab_size": 2, "num_labels": 3,
    # images and sound
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "max_source_positions": 32,
    "max_target_positions": 64, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2, "conv_dim": (16, 16), "conv_stride": (4, 4),
}  # fmt: skip
"""Sizes under every name that configs have for them."""


def shrunk(kind: type, more: dict[str, Any]) -> Any:
    """A tiny config of this class; `more` are settings of its own, of configs inside it as dicts."""
    return kind(**_settings(kind, more))


def _settings(kind: Any, more: dict[str, Any]) -> dict[str, Any]:
    plain = kind()
    names, other = plain.to_dict(), getattr(kind, "attribute_map", {})
    found = {
        name: value for name, value in SIZES.items()
        if (name in names or name in ("pad_token_id", "bos_token_id", "eos_token_id"))
        and other.get(name) not in SIZES
    }  # fmt: skip
    if "num_labels" in found and not hasattr(plain, "num_labels"):
        del found["num_labels"]
    for name in getattr(kind, "sub_configs", {}):
        inside = getattr(plain, name, None)
        if inside is not None:
            given = more.get(name) or {}
            found[name] = _settings(type(inside), given) | {"model_type": inside.model_type}
    own = {
        name: value
        for name, value in more.items()
        if name not in found or not isinstance(value, dict)
    }
    return found | own


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what transformers has to say of tiny models."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def build(architecture: Architecture) -> Any:
    """The model in fp32, the same weights each time, its matrices strong enough to matter."""
    import transformers

    kind = getattr(transformers, architecture.name)
    with silent():
        config = shrunk(kind.config_class, architecture.settings)
        torch.manual_seed(0)
        model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "emb" not in name:
                parameter.mul_(3)
            elif (
                parameter.dim() == 4 and parameter.numel() and parameter.std() > 0
            ):  # of a convolution: as large out as in
                parameter.mul_(parameter[0].numel() ** -0.5 / parameter.std())
    return model


def inputs(takes: str, config: Any) -> dict[str, torch.Tensor]:
    """What a model is run on, the same each time."""
    ids = torch.arange(3, 35)[None] % VOCABULARY
    noise = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=noise)

    side = getattr(getattr(config, "vision_config", config), "image_size", 32)
    side = side if isinstance(side, int) else side[0]
    image, text = {"pixel_values": draw(3, side, side)}, {"input_ids": ids}
    two = {"decoder_input_ids": ids[:, :16]}
    found: dict[str, dict[str, torch.Tensor]] = {
        "text": text,
        "two texts": text | two,
        "image": image,
        "video": {"pixel_values": draw(4, 3, side, side)},
        "text and image": text | image,
        "sound": {"input_values": draw(800)},
        "sound and text": {"input_values": draw(800)} | two,
        "channel": {"input_values": draw(1, 320)},
        "spectrum": {"input_values": draw(64, 16)},
        "frames": {"input_features": draw(64, 16)},
        "wide frames": {"input_features": draw(24, 160)},
        "mel": {"input_features": draw(16, 64)} | two,
    }
    return found[takes]


def run(model: Any, takes: str) -> torch.Tensor:
    """The first tensor of floating point that the model gives, in fp32."""
    signature = inspect.signature(model.forward).parameters
    given = inputs(takes, model.config)
    if "use_cache" in signature:
        given["use_cache"] = False
    with torch.no_grad(), silent():
        made = model(**given)
    for value in made.values() if isinstance(made, dict) else made:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1:
            return value.float()
    raise ValueError(f"{type(model).__name__} gives no tensor")
