"""Adapters for llama.cpp, read back by the package `gguf` and put onto weights by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_checkpoint
from refusals import refused
from tiny_models import FAMILIES, write_family

from deltafold import compress, export
from deltafold.errors import MismatchError

pytestmark = pytest.mark.integration


def read_pairs(path: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float, str]:
    """Pairs by name, alpha, and the architecture; all that llama.cpp checks is checked."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    stems = {name.rpartition(".")[0] for name in tensors}
    assert tensors.keys() == {f"{stem}.lora_{x}" for stem in stems for x in "ab"}
    pairs = {stem: (tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]) for stem in stems}
    return pairs, float(fields["adapter.lora.alpha"]), str(fields["general.architecture"])


def turned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as GGUF's llama models have them, written out: (h, half, j) -> (h, j, half)."""
    d = len(rows) // heads
    order = [
        h * d + half * (d // 2) + j for h in range(heads) for j in range(d // 2) for half in (0, 1)
    ]
    return rows[order]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_pairs_add_up_to_the_delta(name: str, tmp_path: Path) -> None:
    """alpha / r B A of every tensor is the fine-tune's delta, in the order of rows of GGUF."""
    base, finetuned = write_family(tmp_path, name)
    compress(base, finetuned, tmp_path / "x.delta", "lossless")
    record = export(tmp_path / "x.delta", tmp_path / "x.gguf", "gguf-lora", base=base, energy=1.0)
    pairs, alpha, architecture = read_pairs(tmp_path / "x.gguf")
    before, after = read_checkpoint(base), read_checkpoint(finetuned)
    q, k = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
    if architecture == "llama":
        for gguf_name, leaf, heads in ((q, "q", 4), (k, "k", 2)):
            weight = f"model.layers.0.self_attn.{leaf}_proj.weight"
            delta = turned(after[weight].float() - before[weight].float(), heads)
            check(pairs[gguf_name], alpha, delta)
    elif architecture == "gpt2":
        weight = "transformer.h.0.attn.c_attn.weight"
        check(
            pairs["blk.0.attn_qkv.weight"],
            alpha,
            (after[weight].float() - before[weight].float()).T,
        )
    elif architecture == "phi3":
        weight = "model.layers.0.self_attn.qkv_proj.weight"
        check(pairs["blk.0.attn_qkv.weight"], alpha, after[weight].float() - before[weight].float())
    else:
        weight = "model.layers.0.self_attn.q_proj.weight"
        check(pairs[q], alpha, after[weight].float() - before[weight].float())
    rows = {row["name"]: row for row in record["tensors"]}
    embedding = next(row for name, row in rows.items() if "embed_tokens" in name or "wte" in name)
    if embedding["how"] == "pair":
        a, b = pairs["token_embd.weight"]
        weight = embedding["name"]
        delta = after[weight].float() - before[weight].float()
        assert a.shape[0] == 160 and b.shape[0] == 64
        scale = alpha / a.shape[1]
        assert float((scale * a @ b.T - delta).norm() / delta.norm()) < 0.01
    else:
        assert "llama.cpp" in embedding["why"] and "token_embd.weight" not in pairs


def check(pair: tuple[torch.Tensor, torch.Tensor], alpha: float, delta: torch.Tensor) -> None:
    a, b = pair
    made = alpha / len(a) * b @ a
    assert float((made - delta).norm() / delta.norm()) < 0.01


def test_unknown_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltafold.exporting import gguf_files

    base, finetuned = write_family(tmp_path, "llama")
    compress(base, finetuned, tmp_path / "x.delta", "lossless")
    monkeypatch.setattr(gguf_files, "ARCHITECTURES", {"gpt2": "GPT2"})
    wish: Any = lambda: export(tmp_path / "x.delta", tmp_path / "x.gguf", "gguf-lora", base=base)  # noqa: E731
    refused(MismatchError, wish, "llama", "gpt2")
    assert not (tmp_path / "x.gguf").exists()
