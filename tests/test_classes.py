"""The class of a model is its config's; what it lacks or has no place for is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import decaying_delta
from refusals import nothing_left, refused
from safetensors.torch import load_file, save_file

import deltafold
from deltafold.calibration.building import build
from deltafold.calibration.models import class_of, config_of, load_folder
from deltafold.errors import CheckpointError, MismatchError

pytestmark = pytest.mark.integration
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
TEXT = SMALL | {"vocab_size": 160, "pad_token_id": 0}
IDS = torch.arange(3, 19)[None]
# model type, class, settings, inputs
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "classifier": ("llama", "LlamaForSequenceClassification", TEXT | {"num_labels": 3}, {"input_ids": IDS}),
    "tokens": ("bert", "BertForTokenClassification", TEXT | {"num_labels": 5}, {"input_ids": IDS}),
    "masked": ("roberta", "RobertaForMaskedLM", TEXT, {"input_ids": IDS}),
    "embeddings": ("bert", "BertModel", TEXT, {"input_ids": IDS}),
    "sequences": (
        "t5",
        "T5ForConditionalGeneration",
        {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "images": (
        "vit",
        "ViTForImageClassification",
        SMALL | {"image_size": 32, "patch_size": 8, "num_labels": 4},
        {"pixel_values": torch.ones(1, 3, 32, 32)},
    ),
    "sound": (
        "wav2vec2",
        "Wav2Vec2ForCTC",
        TEXT | {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8),
                "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
                "num_feat_extract_layers": 2},
        {"input_values": torch.linspace(-1, 1, 800)[None]},
    ),
    "language": ("llama", "LlamaForCausalLM", TEXT, {"input_ids": IDS}),
}  # fmt: skip


def write_pair(folder: Path, kind: str) -> tuple[Path, Path]:
    """A base and a fine-tune of the same class, which is not the first that transformers thinks of."""
    import transformers

    model_type, name, settings, _ = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += decaying_delta(tuple(parameter.shape), generator)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def outputs(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**KINDS[kind][3])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_the_fine_tune_whatever_it_is(tmp_path: Path, kind: str) -> None:
    import transformers

    base, tuned = write_pair(tmp_path, kind)
    out = tmp_path / "out.delta"
    deltafold.compress(base, tuned, out, "lossless")
    model = deltafold.load(out, base)
    assert type(model).__name__ == KINDS[kind][1]
    kept = getattr(transformers, KINDS[kind][1]).from_pretrained(tuned).eval()
    assert torch.equal(outputs(model, kind), outputs(kept, kind))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"language"}))
def test_what_is_for_language_models_says_so(tmp_path: Path, kind: str) -> None:
    base, tuned = write_pair(tmp_path, kind)
    out, archive = tmp_path / "out", tmp_path / "some.delta"
    deltafold.compress(base, tuned, archive, "lossless")
    (tuned / "tokenizer.json").write_text("{}")
    name = KINDS[kind][1]
    refused(MismatchError, lambda: deltafold.factor(tuned, out, "lord", parameters=0.9), name)
    refused(MismatchError, lambda: deltafold.share(tuned, out, parameters=0.9), name)
    options = {"base": base, "runtime": "vllm"}
    refused(MismatchError, lambda: deltafold.export(archive, out, **options), "causal", "peft")
    refused(MismatchError, lambda: load_folder(tuned), name, "no causal language model")
    nothing_left(out)
    why = deltafold.compress(base, tuned, tmp_path / "auto.delta", file_ratio=2)["calibration"][
        "why"
    ]
    assert name in why and "choose" not in why


def test_a_classifier_on_a_causal_base_is_no_adapter(tmp_path: Path) -> None:
    import transformers

    base, _ = write_pair(tmp_path, "language")
    model = transformers.LlamaForSequenceClassification.from_pretrained(base)
    model.save_pretrained(tmp_path / "classifier")
    out = tmp_path / "out.delta"
    deltafold.compress(base, tmp_path / "classifier", out, "lossless")
    made = deltafold.load(out, base)
    assert torch.equal(made.score.weight, model.score.weight)
    action = lambda: deltafold.export(out, tmp_path / "adapter", base=base)  # noqa: E731
    refused(MismatchError, action, "LlamaForSequenceClassification", "use restore")


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_weights_that_the_class_lacks_or_has_no_place_for(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, "language")
    tensors = load_file(tuned / "model.safetensors")
    save_file(
        tensors | {"score.weight": torch.ones(3, 64)}, tuned / "model.safetensors", {"format": "pt"}
    )
    out = tmp_path / "more.delta"
    deltafold.compress(base, tuned, out, "lossless")
    refused(CheckpointError, lambda: deltafold.load(out, base), "score.weight", "LlamaForCausalLM")
    refused(CheckpointError, lambda: load_folder(tuned), "score.weight", "no place")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {k: v for k, v in tensors.items() if k != name},
        tuned / "model.safetensors",
        {"format": "pt"},
    )
    deltafold.compress(base, tuned, tmp_path / "less.delta", "lossless")
    refused(CheckpointError, lambda: deltafold.load(tmp_path / "less.delta", base), name, "lacks")
    refused(CheckpointError, lambda: load_folder(tuned), name, "lacks the weight")


def test_buffers_of_older_versions_are_no_weights(tmp_path: Path) -> None:
    _, tuned = write_pair(tmp_path, "language")
    tensors = load_file(tuned / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | old, tuned / "model.safetensors", {"format": "pt"})
    assert type(load_folder(tuned)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", [None, "LLaMAForCausalLM"])
def test_a_config_without_a_known_class_is_a_language_model(
    tmp_path: Path, name: str | None
) -> None:
    _, tuned = write_pair(tmp_path, "language")
    edited(tuned, architectures=name and [name])
    assert type(load_folder(tuned)).__name__ == "LlamaForCausalLM"
    assert type(build(tuned)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "name", ["AutoModel", "pipeline", "OwnForRetrieval", "os.system", "BertForMaskedLM", "__doc__"]
)
def test_names_that_are_no_class_for_it(tmp_path: Path, name: str) -> None:
    _, tuned = write_pair(tmp_path, "language")
    edited(tuned, architectures=[name])
    for causal in (True, False):
        refused(
            MismatchError, lambda c=causal: class_of(config_of(tuned), "it", c), "'llama'", name
        )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, ("'own'", "is not run")),
        ({"model_type": None}, ("names no model type",)),
        ({"model_type": "own"}, ("'own'",)),
    ],
)
def test_configs_of_no_known_model(tmp_path: Path, changes: dict[str, Any], words) -> None:
    _, tuned = write_pair(tmp_path, "language")
    edited(tuned, **changes)
    said = refused(CheckpointError, lambda: config_of(tuned), "cannot be read", *words)
    assert "copy" not in said


def test_what_factor_writes_opens_whole(tmp_path: Path) -> None:
    _, tuned = write_pair(tmp_path, "language")
    out = tmp_path / "out"
    deltafold.factor(tuned, out, "svd", parameters=0.9, calibration="none")
    assert type(deltafold.load(out)).__name__ == "DeltafoldLlamaForCausalLM"
    name = "model.norm.weight"
    tensors = load_file(out / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != name}, out / "model.safetensors", {"format": "pt"}
    )
    refused(CheckpointError, lambda: deltafold.load(out), name, "lacks the weight")
