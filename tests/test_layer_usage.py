"""How models use their layers: what may stand in a layer's place, or beside it, and what may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_checkpoint
from test_fold_kinds import IDS, build
from torch import nn

import deltafold
from deltafold.calibration.usage import (
    is_linear,
    is_passed_over,
    is_rewritten,
    looks_up_ids,
    tied_layers,
)


class Product(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


class Router(nn.Linear):
    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input).topk(1)


class Positions(nn.Embedding):
    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.cumsum(-1))


class Around(nn.Module):
    """Layers that are called, read, written, tied, and a table whose size is read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.changed, self.twin = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.sized = nn.Embedding(4, 4), nn.Embedding(4, 4)
        self.twin.weight = self.called.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.changed.weight.div_(2)
        x = self.table(x) + self.sized(torch.arange(self.sized.num_embeddings))
        x = self.twin(self.changed(x))
        return self.called(x) @ self.read.weight + self.both(x) @ self.both.weight


def test_a_layer_is_what_it_computes() -> None:
    assert is_linear(nn.Linear(2, 2)) and is_linear(Product(2, 2))
    assert not is_linear(Router(2, 2)) and not is_linear(nn.Conv1d(2, 2, 1))
    assert looks_up_ids(nn.Embedding(2, 2)) and not looks_up_ids(Positions(2, 2))


def test_a_layer_is_how_it_is_used() -> None:
    model = Around()
    names = [name for name, _ in model.named_children()]
    assert [name for name in names if is_passed_over(model, name)] == ["read", "sized"]
    assert [name for name in names if is_rewritten(model, name)] == ["changed"]
    assert tied_layers(model) == {"called", "twin"}


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["gpt_neox", "mamba", "falcon_h1"])
def test_composed_models_compute_what_their_layers_amount_to(kind: str, tmp_path: Path) -> None:
    """Names that transformers gives one class, a weight that is read, buffers that no file holds."""
    from transformers import AutoModelForCausalLM

    more = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
            "mamba_d_state": 16, "mamba_chunk_size": 16}  # fmt: skip
    model = build(kind, **(more if kind == "falcon_h1" else {}))
    model.save_pretrained(tmp_path / "whole")
    options: dict[str, Any] = {"parameters": 0.8, "calibration": "none"}
    deltafold.factor(tmp_path / "whole", tmp_path / "factors", "svd", **options)
    deltafold.factor(tmp_path / "whole", tmp_path / "dense", "svd", dense=True, **options)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    for made in (
        deltafold.load(tmp_path / "factors"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "factors", trust_remote_code=True).eval(),
    ):
        with torch.no_grad():
            wanted = dense(IDS).logits
            assert torch.allclose(made(IDS).logits, wanted, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.integration
def test_a_module_given_whole_has_its_buffers(tmp_path: Path) -> None:
    """PEFT loads the statistics of a batch norm with it; a layer called `1` is named by its path."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for each in [*model.parameters(), *model.buffers()]:
            if each.is_floating_point():
                each += 0.1 * torch.rand(each.shape)
    model.save_pretrained(tmp_path / "tuned")
    archive = tmp_path / "some.delta"
    deltafold.compress(tmp_path / "base", tmp_path / "tuned", archive, "lossless")
    deltafold.export(archive, tmp_path / "adapter", base=tmp_path / "base", rank=8)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["classifier.1"] and config["task_type"] is None
    names = set(read_checkpoint(tmp_path / "adapter"))
    norm = "base_model.model.resnet.embedder.embedder.normalization"
    leaves = ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")
    assert {f"{norm}.{leaf}" for leaf in leaves} <= names


@pytest.mark.integration
def test_a_norm_is_given_by_the_names_that_its_module_has(tmp_path: Path) -> None:
    """Older files of BERT call them gamma and beta; PEFT asks for weight and bias."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**sizes, intermediate_size=32))
    for name, change in (("base", 0.0), ("tuned", 0.1)):
        model.save_pretrained(tmp_path / name)
        old = {
            key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): each
            + change
            for key, each in read_checkpoint(tmp_path / name).items()
        }
        save_file(old, tmp_path / name / "model.safetensors", {"format": "pt"})
    deltafold.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "some.delta", "lossless")
    out = tmp_path / "adapter"
    record = deltafold.export(tmp_path / "some.delta", out, base=tmp_path / "base", rank=8)
    given = {row["name"] for row in record["tensors"] if row["how"] == "whole"}
    assert "embeddings.LayerNorm.gamma" in given
    names = {key for key in read_checkpoint(out) if "embeddings.LayerNorm" in key}
    assert {key.rpartition(".")[2] for key in names} == {"weight", "bias"}
