"""What of a folder comes along: everything small, modules in folders; what does not, with its name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import format_reader
import pytest
import torch
from checkpoints import PairFiles, make_pair, same_bits, tree_hashes
from conftest import Run
from refusals import refused
from safetensors.torch import load_file, save_file

import deltafold
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.contents import is_foreign, is_plain_path
from deltafold.errors import CheckpointError
from deltafold.factoring.factor import factor
from deltafold.folding.fold import fold
from deltafold.merging.choosing import merge
from deltafold.merging.recipe import Model, Recipe

pytestmark = pytest.mark.integration
BESIDE = {
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 64}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "assets/voices/en.json": "{}",
    "bpe.codes": "a b\n",
    "code/model/attention.py": "WIDTH = 64\n",
    "code/model/__init__.py": "",
    "LICENSE": "as you like",
    "modules.json": "[]",
    "processor_config.json": "{}",
    "qwen.tiktoken": "IQ== 0\n",
    "sentence_bert_config.json": "{}",
    "source.spm": "pieces",
    "tekken.json": '{"vocab": []}',
    "video_preprocessor_config.json": "{}",
}
FOREIGN = {
    "checkpoint-500/model.safetensors": "a state of a training run",
    "flax_model.msgpack": "another format",
    "ggml-model-q4.gguf": "another format",
    "onnx/model.onnx": "another format",
    "onnx/model.onnx_data": "another format",
    "openvino/openvino_model.bin": "another format",
    "optimizer.pt": "training state",
    "original/consolidated.00.pth": "pickle",
    "pytorch_model.bin": "pickle",
    "pytorch_model.bin.index.json": "an index",
    "runs/events.out.tfevents.1.host": "a log",
    "consolidated.safetensors": "weights that are not read",
    "training_args.bin": "pickle",
}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def dense(folder: Path, scale: float) -> torch.Tensor:
    """A module of sentence-transformers in a folder of its own."""
    weight = scale * torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    (folder / "2_Dense").mkdir(exist_ok=True)
    tensors = {"linear.weight": weight, "linear.bias": torch.full((32,), scale)}
    save_file(tensors, folder / "2_Dense/model.safetensors", {"format": "pt"})
    return weight


@pytest.fixture
def modular(tmp_path: Path) -> PairFiles:
    """A pair with modules in folders, code, templates, and much that is not the model's."""
    pair = make_pair(tmp_path)
    for folder, scale in ((pair.base, 1.0), (pair.finetuned, 1.01)):
        dense(folder, scale)
        put(folder, BESIDE)
    put(pair.finetuned, dict.fromkeys(FOREIGN, "foreign") | {"1_Pooling/config.json": "{}"})
    return pair


def beside(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in BESIDE}


@pytest.mark.parametrize("method", ["lossless", "svd-quant"])
def test_all_that_is_small_comes_back_and_the_rest_is_named(
    modular: PairFiles, tmp_path: Path, method: str
) -> None:
    out, restored = tmp_path / "out.delta", tmp_path / "restored"
    size = {} if method == "lossless" else {"file_ratio": 4}
    record = deltafold.compress(modular.base, modular.finetuned, out, method, **size)
    deltafold.restore(out, modular.base, restored)
    deltafold.verify(out, modular.base, modular.finetuned)
    assert beside(restored) == beside(modular.finetuned)
    names = {each["name"]: each["why"] for each in record["left_out"]}
    for name, why in FOREIGN.items():
        name = "checkpoint-500/" if name.startswith("checkpoint-500/") else name
        assert why in names.pop(name)
        assert not (restored / name).exists()
    assert names == {}
    if method == "lossless":
        kept = dict(tree_hashes(restored))
        theirs = tree_hashes(modular.finetuned)
        assert kept == {name: theirs[name] for name in kept}
        assert "2_Dense/model.safetensors" in kept


def test_another_reader_reads_folders(modular: PairFiles, tmp_path: Path) -> None:
    out, restored = tmp_path / "out.delta", tmp_path / "restored"
    deltafold.compress(modular.base, modular.finetuned, out, "svd-quant", file_ratio=4)
    deltafold.restore(out, modular.base, restored)
    assert format_reader.restore(out, modular.base) == format_reader.read_folder(restored)
    assert "2_Dense/linear.weight" in format_reader.read_folder(restored)
    assert "1_Pooling/config.json" in format_reader.side_files(out, modular.base)


def test_restored_in_other_shards(modular: PairFiles, tmp_path: Path) -> None:
    out, restored = tmp_path / "out.delta", tmp_path / "restored"
    deltafold.compress(modular.base, modular.finetuned, out, "lossless")
    deltafold.restore(out, modular.base, restored, shard_bytes=100_000)
    theirs = load_file(modular.finetuned / "2_Dense/model.safetensors")
    assert same_bits(load_file(restored / "2_Dense/model.safetensors"), theirs)
    index = json.loads((restored / "model.safetensors.index.json").read_text())
    assert not any("/" in name for each in index["weight_map"].items() for name in each)
    with Checkpoint(restored) as one, Checkpoint(modular.finetuned) as other:
        assert set(one.tensors) == set(other.tensors)


def pipeline(folder: Path, scale: float, indexed: bool = True) -> Path:
    """A folder of diffusers: each part has a config and weights of its own, one in two files."""
    generator = torch.Generator().manual_seed(5)

    def made(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    parts = ["transformer", "vae", "text_encoder", "text_encoder_2"]
    for part in [*parts, "scheduler", "tokenizer"]:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"of": part}))
    if indexed:
        (folder / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    (folder / "tokenizer/vocab.json").write_text("{}")
    save_file(
        {"conv.weight": made(32, 32, 3, 3)}, folder / "vae/diffusion_pytorch_model.safetensors"
    )
    for part in parts[2:]:
        save_file({"layers.0.mlp.weight": made(64, 64)}, folder / part / "model.safetensors")
    weight_map = {}
    for number in (1, 2):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        name = f"blocks.{number - 1}.attn.to_q.weight"
        save_file({name: made(64, 64)}, folder / "transformer" / file)
        weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    at = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    at.write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("indexed", [True, False])
def test_a_folder_of_diffusers_is_a_pair(tmp_path: Path, indexed: bool) -> None:
    base = pipeline(tmp_path / "base", 1.0, indexed)
    tuned = pipeline(tmp_path / "tuned", 1.001, indexed)
    variant = tuned / "vae/diffusion_pytorch_model.fp16.safetensors"
    save_file({"conv.weight": torch.ones(4).half()}, variant)
    for method, size in (("lossless", {}), ("auto", {"file_ratio": 4})):
        out, restored = tmp_path / f"{method}.delta", tmp_path / method
        record = deltafold.compress(base, tuned, out, method, **size, calibration="none")
        assert [each["name"] for each in record["left_out"]] == [
            "vae/diffusion_pytorch_model.fp16.safetensors"
        ]
        deltafold.restore(out, base, restored)
        deltafold.verify(out, base, tuned)
        assert set(tree_hashes(restored)) == set(tree_hashes(tuned)) - {
            "vae/diffusion_pytorch_model.fp16.safetensors"
        }
    kept, theirs = tree_hashes(tmp_path / "lossless"), tree_hashes(tuned)
    del theirs["vae/diffusion_pytorch_model.fp16.safetensors"]
    assert {n: h for n, h in kept.items() if not n.endswith("safetensors")} == {
        n: h for n, h in theirs.items() if not n.endswith("safetensors")
    }
    for file in tuned.rglob("*.safetensors"):
        if file != variant:
            assert same_bits(
                load_file(file), load_file(tmp_path / "lossless" / file.relative_to(tuned))
            )


def test_a_pair_of_files_without_modules_is_as_before(tmp_path: Path) -> None:
    """Nothing is said where nothing is left out."""
    pair = make_pair(tmp_path)
    record = deltafold.compress(pair.base, pair.finetuned, tmp_path / "out.delta", "lossless")
    assert record["left_out"] == []


NOT_PLAIN = [
    "", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", "a/.hidden", ".git/config", "C:/a", "a\\b",
    "a\nb", "a/\x00", "x" * 241, "/".join("abcdefghi"), "a\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_no_plain_path(name: str) -> None:
    assert not is_plain_path(name)


def test_plain_paths() -> None:
    assert all(
        map(is_plain_path, ["a", "1_Pooling/config.json", "modèle final.txt", "a/b/c/d/e/f/g/h"])
    )


@pytest.mark.parametrize(
    "name", ["a.BIN", "x/model.safetensors", "m.gguf.part1", "model.ckpt-3.meta"]
)
def test_what_is_foreign(name: str) -> None:
    assert is_foreign(name)
    assert not is_foreign("tokenizer.model")


def test_names_that_cannot_be_held_are_left_out(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    (pair.finetuned / "notes: mine.txt").write_text("x")
    (pair.finetuned / "Model.safetensors.index.json").write_text("{}")
    (pair.finetuned / "link").symlink_to(pair.base)
    (pair.finetuned / os.fsdecode(b"\xff.txt")).write_text("x")
    record = deltafold.compress(pair.base, pair.finetuned, tmp_path / "out.delta", "lossless")
    names = [each["name"] for each in record["left_out"]]
    assert len(names) == 4 and {"link/", "notes: mine.txt"} < set(names)
    deltafold.restore(tmp_path / "out.delta", pair.base, tmp_path / "restored")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda f: (f / "delta.json").write_text("{}"), ("is an archive", "restore it first")),
        (lambda f: [(f / n).mkdir() for n in ("blobs", "snapshots")], ("cache", "snapshots")),
        (lambda f: (f / "model.gguf").write_bytes(b"GGUF"), ("model.gguf", "was made from")),
        (lambda f: (f / "a.bin").write_bytes(b""), ("a.bin", "safe_serialization")),
        (lambda f: put(f, {"checkpoint-5/model.safetensors": ""}), ("checkpoint-5",)),
        (lambda f: None, ("point at the folder",)),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path: Path, make, words) -> None:
    make(tmp_path)
    refused(CheckpointError, lambda: Checkpoint(tmp_path), *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(60), ("GGUF",)),
        (b"PK\x03\x04" + bytes(60), ("pickle",)),
        (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS",)),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, words) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    refused(CheckpointError, lambda: Checkpoint(file), *words)
    refused(CheckpointError, lambda: Checkpoint(tmp_path), *words)


CONFIGS = {
    "null": b"null",
    "a list": b'[["model_type", "llama"]]',
    "a number": b"3",
    "not valid JSON": b"{",
    "not UTF-8": b'{"a": "\xff"}',
    "nested too deeply": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_no_object(tmp_path: Path, case: str) -> None:
    pair = make_pair(tmp_path)
    (pair.finetuned / "config.json").write_bytes(CONFIGS[case])
    said = "" if case == "not UTF-8" else case
    out = tmp_path / "out"
    for action in (
        lambda: deltafold.compress(pair.base, pair.finetuned, out, "lossless"),
        lambda: fold(pair.finetuned, out, "random", blocks=1, calibration="none"),
        lambda: factor(pair.finetuned, out, "svd", parameters=0.9, calibration="none"),
    ):
        refused(CheckpointError, action, "config.json", said)


@pytest.mark.parametrize("verb", ["fold", "factor", "factor dense", "merge"])
def test_what_is_made_of_a_model_has_all_that_lay_beside_it(
    modular: PairFiles, tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "out"
    if verb == "fold":
        record = fold(modular.finetuned, out, "random", blocks=1, calibration="none")
    elif verb == "merge":
        recipe = Recipe((Model(str(modular.finetuned), 1.0),), "task-arithmetic")
        record = merge(recipe, out, base=modular.base)
    else:
        dense = verb == "factor dense"
        record = factor(
            modular.finetuned, out, "svd", parameters=0.9, calibration="none", dense=dense
        )
    source = modular.base if verb == "merge" else modular.finetuned
    assert beside(out) == beside(source)
    theirs = load_file(modular.finetuned / "2_Dense/model.safetensors")
    made = load_file(out / "2_Dense/model.safetensors")
    assert made.keys() == theirs.keys()
    if verb == "merge":
        assert all(torch.allclose(made[name], theirs[name]) for name in theirs)
    else:
        assert same_bits(made, theirs)
    names = {each["name"] for each in record["left_out"]}
    assert {"optimizer.pt", "pytorch_model.bin", "onnx/model.onnx", "checkpoint-500/"} <= names
    assert not any((out / name).exists() for name in names)
    with Checkpoint(out) as checkpoint:
        assert all("/" not in name for name in checkpoint.own_tensors)


def test_a_healed_model_keeps_its_modules(modular: PairFiles, tmp_path: Path) -> None:
    """transformers writes the weights there, and knows nothing of modules."""
    from deltafold.checkpoint.beside import copy_beside

    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    copy_beside(modular.finetuned, target)
    assert beside(target) == beside(modular.finetuned)
    assert (target / "config.json").read_text() == "{}"
    assert (target / "2_Dense/model.safetensors").is_file()
    assert not (target / "model.safetensors").exists()
    assert not (target / "optimizer.pt").exists()
    copy_beside(modular.finetuned, target, replace=True)
    assert (target / "config.json").read_text() != "{}"


def test_a_merge_takes_modules_that_only_its_models_have(
    modular: PairFiles, tmp_path: Path
) -> None:
    (modular.base / "1_Pooling/config.json").unlink()
    (modular.base / "tekken.json").unlink()
    recipe = Recipe((Model(str(modular.finetuned), 1.0),), "task-arithmetic")
    out = tmp_path / "out"
    record = merge(recipe, out, base=modular.base)
    assert (out / "1_Pooling/config.json").read_text() == "{}"
    assert any("tekken.json" in note for note in record["notes"])


def test_the_command_line_names_what_is_left_out(
    modular: PairFiles, tmp_path: Path, deltafold: Run
) -> None:
    out = tmp_path / "out.delta"
    done = deltafold("compress", modular.base, modular.finetuned, "-o", out, "-m", "lossless")
    assert done.returncode == 0
    assert "left out" in done.stdout and "optimizer.pt" in done.stdout


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_of_diffusers_keeps_its_files_names(tmp_path: Path, sharded: bool) -> None:
    """Alone in a folder: no index of transformers beside it, and merged it is called the same."""
    stem = "diffusion_pytorch_model"
    for n, name in enumerate(("base", "tuned")):
        tensors = {f"blocks.{k}.to_q.weight": torch.full((64, 64), n + k + 1.0) for k in (0, 1)}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
        if not sharded:
            save_file(tensors, tmp_path / name / f"{stem}.safetensors", {"format": "pt"})
            continue
        weight_map = {}
        for k, (key, tensor) in enumerate(tensors.items()):
            file = f"{stem}-0000{k + 1}-of-00002.safetensors"
            save_file({key: tensor}, tmp_path / name / file, {"format": "pt"})
            weight_map[key] = file
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / name / f"{stem}.safetensors.index.json").write_text(index)
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "some.delta"
    deltafold.compress(base, tuned, out, "lossless")
    deltafold.restore(out, base, tmp_path / "restored")
    assert tree_hashes(tmp_path / "restored") == tree_hashes(tuned)
    deltafold.merge([tuned], tmp_path / "merged", "average", base=base)
    names = {each.name for each in (tmp_path / "merged").iterdir()}
    assert names == {"config.json", f"{stem}.safetensors"}
