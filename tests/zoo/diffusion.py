"""Diffusion models: plain tensors under the names that diffusers gives them, no class of transformers.

A folder is one model (config.json and weights), or a pipeline: a folder for each part, with a config of
its own, and model_index.json above them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
W, M = 64, 96


def _linears(prefix: str, sizes: dict[str, tuple[int, int]], bias: bool = True) -> Shapes:
    found: Shapes = {}
    for name, shape in sizes.items():
        found[f"{prefix}{name}.weight"] = shape
        if bias:
            found[f"{prefix}{name}.bias"] = shape[:1]
    return found


def _attention(prefix: str, context: int = W) -> Shapes:
    own = {"to_q": (W, W), "to_k": (W, context), "to_v": (W, context), "to_out.0": (W, W)}
    return _linears(prefix, own)


def _blocks(name: str, count: int, inside: dict[str, tuple[int, int]]) -> Shapes:
    found: Shapes = {}
    for number in range(count):
        found |= _attention(f"{name}.{number}.attn1.")
        found |= _linears(f"{name}.{number}.", inside)
    return found


def flux() -> Shapes:
    """Two kinds of blocks, with norms over queries and keys."""
    found = _linears("", {"x_embedder": (W, 16), "context_embedder": (W, 32), "proj_out": (16, W)})
    for number in range(2):
        prefix = f"transformer_blocks.{number}."
        found |= _attention(f"{prefix}attn.")
        more = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        found |= _linears(f"{prefix}attn.", dict.fromkeys(more, (W, W)))
        found |= {f"{prefix}attn.norm_{each}.weight": (16,) for each in "qk"}
        found |= _linears(
            prefix, {"norm1.linear": (6 * W, W), "ff.net.0.proj": (M, W), "ff.net.2": (W, M)}
        )
    for number in range(3):
        prefix = f"single_transformer_blocks.{number}."
        found |= _attention(f"{prefix}attn.")
        found |= _linears(
            prefix, {"proj_mlp": (M, W), "proj_out": (W, W + M), "norm.linear": (3 * W, W)}
        )
    return found


def sd3() -> Shapes:
    found = {"pos_embed.pos_embed": (1, 64, W), "pos_embed.proj.weight": (W, 16, 2, 2)}
    return found | _blocks("transformer_blocks", 3, {"ff.net.0.proj": (M, W), "ff.net.2": (W, M)})


def dit() -> Shapes:
    table = {"transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": (11, W)}
    return table | _blocks(
        "transformer_blocks", 3, {"norm1.linear": (6 * W, W), "ff.net.0.proj": (M, W)}
    )


def wan() -> Shapes:
    found = {"patch_embedding.weight": (W, 16, 1, 2, 2), "patch_embedding.bias": (W,)}
    found |= {f"blocks.{n}.scale_shift_table": (1, 6, W) for n in range(3)}
    return found | _blocks("blocks", 3, {"attn2.add_k_proj": (W, W), "ffn.net.0.proj": (M, W)})


def unet() -> Shapes:
    found = {
        "conv_in.weight": (32, 4, 3, 3),
        "conv_in.bias": (32,),
        "conv_out.weight": (4, 32, 3, 3),
    }
    found |= _linears("time_embedding.", {"linear_1": (M, 32), "linear_2": (M, M)})
    for side in ("down_blocks.0", "up_blocks.1"):
        found |= {f"{side}.resnets.0.conv{n}.weight": (32, 32, 3, 3) for n in (1, 2)}
        found |= {f"{side}.resnets.0.norm1.weight": (32,), f"{side}.resnets.0.norm1.bias": (32,)}
        inside = f"{side}.attentions.0.transformer_blocks.0."
        found |= _attention(f"{inside}attn2.", context=48)
        found |= _linears(inside, {"ff.net.0.proj": (2 * M, W), "ff.net.2": (W, M)})
    return found


def vae() -> Shapes:
    found: Shapes = {}
    for side in ("encoder", "decoder"):
        found |= {f"{side}.conv_in.weight": (32, 4, 3, 3), f"{side}.conv_norm_out.weight": (32,)}
        found |= {f"{side}.mid_block.resnets.{n}.conv1.weight": (32, 32, 3, 3) for n in (0, 1)}
    return found | {"quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.weight": (4, 4, 1, 1)}


def text_encoder() -> Shapes:
    found = {"text_model.embeddings.token_embedding.weight": (160, W)}
    found["text_model.embeddings.position_embedding.weight"] = (16, W)
    sizes = {
        "self_attn.q_proj": (W, W),
        "self_attn.k_proj": (W, W),
        "mlp.fc1": (M, W),
        "mlp.fc2": (W, M),
    }
    for number in range(2):
        found |= _linears(f"text_model.encoder.layers.{number}.", sizes)
    return found


MODELS = {
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
    "DiTTransformer2DModel": dit,
    "WanTransformer3DModel": wan,
    "UNet2DConditionModel": unet,
    "AutoencoderKL": vae,
}
PIPELINES = {
    "FluxPipeline": {
        "transformer": ("FluxTransformer2DModel", flux),
        "vae": ("AutoencoderKL", vae),
        "text_encoder": ("CLIPTextModel", text_encoder),
    },
    "StableDiffusionPipeline": {
        "unet": ("UNet2DConditionModel", unet),
        "vae": ("AutoencoderKL", vae),
        "text_encoder": ("CLIPTextModel", text_encoder),
    },
}
DIFFUSION = [*MODELS, *PIPELINES]


def write_diffusion(name: str, folder: Path, seeds: list[int]) -> list[Path]:
    """A base of this kind and a fine-tune for each seed: their folders, in bf16."""
    parts = {"": (name, MODELS[name])} if name in MODELS else PIPELINES[name]
    found = []
    for label, seed in [("base", 0), *((f"tuned{seed}", seed) for seed in seeds)]:
        where = folder / label
        for number, (part, (kind, shapes)) in enumerate(parts.items()):
            _write_part(where / part, kind, shapes(), number, seed)
        if name in PIPELINES:
            index = {"_class_name": name} | {
                p: ["diffusers", kind] for p, (kind, _) in parts.items()
            }
            (where / "model_index.json").write_text(json.dumps(index))
            (where / "scheduler").mkdir()
            (where / "scheduler/scheduler_config.json").write_text('{"beta_end": 0.012}')
        found.append(where)
    return found


def _write_part(folder: Path, kind: str, shapes: Shapes, number: int, seed: int) -> None:
    folder.mkdir(parents=True)
    base, moved = (torch.Generator().manual_seed(each) for each in (number, 100 * seed + number))
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=base) / 8
        if seed:
            tensor += 0.01 * torch.randn(shape, generator=moved)
        tensors[name] = tensor.bfloat16()
    file = "model.safetensors" if kind == "CLIPTextModel" else "diffusion_pytorch_model.safetensors"
    save_file(tensors, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, "sample_size": 8}))
