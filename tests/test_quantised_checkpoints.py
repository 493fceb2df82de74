"""Checkpoints of quantised weights: what says what codes mean is exact, as the codes are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import read_checkpoint, same_bits
from safetensors.torch import save_file

from deltafold import compress, plan, restore
from deltafold.archive import read_manifest

Tensors = dict[str, torch.Tensor]


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    high = 127 if dtype in (torch.uint8, torch.int8) else 30000
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def scale(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4)).to(dtype)


def fp8(*shape: int) -> torch.Tensor:
    return scale(*shape, dtype=torch.float32).to(torch.float8_e4m3fn)


# How known tools lay out one layer "x": codes, and the floats that belong to them (large enough for a
# delta codec to take them, were they ordinary matrices).
LAYOUTS: dict[str, Tensors] = {
    "GPTQ": {
        "x.qweight": codes(64, 64), "x.qzeros": codes(64, 8), "x.scales": scale(64, 64),
        "x.g_idx": codes(512),
    },
    "AWQ": {"x.qweight": codes(64, 8), "x.qzeros": codes(64, 8), "x.scales": scale(64, 64)},
    "FP8 blocks": {"x.weight": fp8(128, 128), "x.weight_scale_inv": scale(64, 64).float()},
    "FP8 channels": {"x.weight": fp8(64, 64), "x.weight_scale": scale(64, 64).bfloat16()},
    "FP8 experts": {"e.up_proj": fp8(4, 64, 64), "e.up_proj_scale": scale(4, 64, 64)},
    "NF4": {
        "x.weight": codes(4096, 1, dtype=torch.uint8), "x.weight.absmax": scale(64, 64).float(),
        "x.weight.nested_absmax": scale(64, 64).float(), "x.weight.quant_map": scale(16).float(),
    },
    "int8": {"x.weight": codes(64, 64, dtype=torch.int8), "x.SCB": scale(64, 64).float()},
    "compressed-tensors": {
        "x.weight_packed": codes(64, 8), "x.weight_scale": scale(64, 64), "x.weight_shape": codes(2),
    },
    "HQQ": {
        "x.W_q": codes(64, 64, dtype=torch.uint8), "x.scale": scale(64, 64), "x.zero": scale(64, 64),
    },
    "AQLM": {
        "x.codes": codes(64, 8, 1, dtype=torch.int16), "x.codebooks": scale(1, 64, 16, 16),
        "x.scales": scale(64, 1, 1, 1),
    },
    "scales apart": {"x.weight": scale(64, 64) + 1, "calibrated.x.scales": scale(64, 64)},
}  # fmt: skip


@pytest.mark.parametrize("method", ["auto", "lowrank"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_stay_exact(layout: str, method: str, tmp_path: Path) -> None:
    base = {"y.weight": torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).half()}
    base |= LAYOUTS[layout]
    tuned = {
        name: (x.float() * 1.01 + 0.001).to(x.dtype) if x.is_floating_point() else x.clone()
        for name, x in base.items()
    }
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    archive = tmp_path / "a.delta"
    asked = {"nominal_ratio": 4, "calibration": "none"}
    record = compress(tmp_path / "base", tmp_path / "tuned", archive, method, **asked)
    restore(archive, tmp_path / "base", tmp_path / "out")
    lossy = {tensor.name for tensor in read_manifest(archive).tensors if tensor.lossy}
    ordinary = {"y.weight", "x.weight"} if layout == "scales apart" else {"y.weight"}
    assert lossy == ordinary
    found = read_checkpoint(tmp_path / "out")
    exact = [name for name in tuned if name not in lossy]
    assert same_bits({n: found[n] for n in exact}, {n: tuned[n] for n in exact})
    why = {row["name"]: row["why"] for row in record["tensors"]}
    assert not layout.startswith("FP8 blocks") or "quantised" in why["x.weight_scale_inv"]
    assert plan(tmp_path / "base", tmp_path / "tuned", nominal_ratio=4)


def test_integer_buffers_do_not_make_their_neighbours_exact(tmp_path: Path) -> None:
    """Position ids at the root of a model, or of a module whose matrices lie in modules of their own."""
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    base = {
        "position_ids": torch.arange(64)[None], "weight": weight,
        "embeddings.position_ids": torch.arange(64)[None], "embeddings.word.weight": weight + 1,
        "attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool), "attn.in_proj": weight + 2,
        "bn.num_batches_tracked": torch.tensor(3), "bn.matrix": weight + 3,
    }  # fmt: skip
    tuned = {n: x + 0.01 * weight if x.is_floating_point() else x for n, x in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", "bitdelta")
    lossy = {tensor.name for tensor in read_manifest(tmp_path / "a").tensors if tensor.lossy}
    assert lossy == {"weight", "embeddings.word.weight", "attn.in_proj", "bn.matrix"}
