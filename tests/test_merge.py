"""`merge`: against whole-model formulas, from archives, bounded, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tree_hashes
from evaluation_models import VOCABULARY, make_llama, make_tokenizer, nudged, save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltafold import compress, merge
from deltafold.coding.counter import derive_key
from deltafold.errors import MismatchError, UsageError
from deltafold.merging.merge import agreement
from deltafold.merging.methods import PRESETS, SPARSIFIERS
from deltafold.merging.recipe import Model, Recipe, value_at
from deltafold.merging.recipe_files import read_recipe
from deltafold.restoring.load import load_state

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base, and three fine-tunes."""
    root = tmp_path_factory.mktemp("merge")
    made = [save(make_llama(1).bfloat16(), root / "base", make_tokenizer())]
    for seed in (2, 3, 4):
        model = nudged(make_llama(1), seed, 0.2).bfloat16()
        made.append(save(model, root / f"tuned{seed}", make_tokenizer()))
    return made


def states(folders: list[Path]) -> list[State]:
    return [load_file(folder / "model.safetensors") for folder in folders]


def recipe(folders: list[Path], *names: str, **options: Any) -> Recipe:
    return Recipe(tuple(Model(str(folder)) for folder in folders[1:]), *names, **options)


def by_formula(method: str, folders: list[Path], scale: float) -> State:
    """The straightforward computation over whole models, weights 1."""
    base, *tuned = states(folders)
    found = {}
    for name, ground in base.items():
        deltas = [state[name].float() - ground.float() for state in tuned]
        if method == "dare":
            deltas = [
                SPARSIFIERS["dare"](d, 0.5, derive_key(0, name, f"merge {n}"), {})
                for n, d in enumerate(deltas)
            ]
        if method == "ties":
            for n, delta in enumerate(deltas):
                kept = max(1, int(0.2 * delta.numel()))
                order = delta.abs().reshape(-1).argsort(descending=True, stable=True)
                mask = torch.zeros(delta.numel()).index_fill(0, order[:kept], 1.0)
                deltas[n] = delta * mask.reshape(delta.shape)
            stack = torch.stack(deltas)
            sign = stack.sum(0).sign()
            agrees = (stack * sign) > 0
            merged = (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        else:
            merged = torch.stack(deltas).sum(0)
        found[name] = (ground.float() + scale * merged).to(ground.dtype)
    return found


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "dare"])
def test_it_is_the_formula(method: str, folders: list[Path], tmp_path: Path) -> None:
    merge(recipe(folders, method, scale=0.6), tmp_path / "out", base=folders[0])
    wanted, found = by_formula(method, folders, 0.6), load_file(tmp_path / "out/model.safetensors")
    assert wanted.keys() == found.keys()
    for name in wanted:
        spacing = 2**-7 * wanted[name].abs().float().clamp_min(1e-3)
        assert ((wanted[name].float() - found[name].float()).abs() <= spacing).all(), name


def test_an_average_is_the_mean_of_the_models(folders: list[Path], tmp_path: Path) -> None:
    merge(recipe(folders, "average"), tmp_path / "out", base=folders[0])
    _, *tuned = states(folders)
    for name, found in load_file(tmp_path / "out/model.safetensors").items():
        mean = torch.stack([state[name].float() for state in tuned]).mean(0)
        assert torch.allclose(found.float(), mean, rtol=2**-8, atol=1e-6)


def test_slerp_lies_between(folders: list[Path], tmp_path: Path) -> None:
    models = (Model(str(folders[1]), 1.0), Model(str(folders[2]), 0.0))
    merge(Recipe(models, "slerp"), tmp_path / "one", base=folders[0])
    one = load_file(tmp_path / "one/model.safetensors")
    for name, tensor in states(folders)[1].items():
        assert torch.allclose(one[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_gives_a_model(method: str, folders: list[Path], tmp_path: Path) -> None:
    chosen = folders[:3] if method == "slerp" else folders
    record = merge(recipe(chosen, method), tmp_path / "out", base=chosen[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.shape[-1] == VOCABULARY and logits.isfinite().all()
    row = record["tensors"][0]
    assert len(row["norms"]) == len(chosen) - 1 and row["norm"] > 0 and 0 <= row["agreed"] <= 1


def test_one_model_alone_is_itself(folders: list[Path], tmp_path: Path) -> None:
    merge(recipe(folders[:2], "ties", sparsifier="none"), tmp_path / "out", base=folders[0])
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.allclose(tensor.float(), states(folders)[1][name].float(), rtol=2**-7)


def test_from_archives(folders: list[Path], tmp_path: Path) -> None:
    """The same as from the checkpoints that the archives restore to."""
    options = {"file_ratio": 3, "calibration": "none"}
    for n, folder in enumerate(folders[1:3]):
        compress(folders[0], folder, tmp_path / f"{n}.delta", **options)
    archives = [folders[0], tmp_path / "0.delta", tmp_path / "1.delta"]
    merge(recipe(archives, "task-arithmetic"), tmp_path / "out", base=folders[0])
    base, found = states(folders)[0], load_file(tmp_path / "out/model.safetensors")
    restored = [load_state(archive, folders[0]) for archive in archives[1:]]
    for name, ground in base.items():
        merged = sum(state[name].float() - ground.float() for state in restored)
        assert torch.equal(found[name], (ground.float() + merged).to(ground.dtype))


def test_the_same_bytes_whatever_the_workers_and_shards_are_right(
    folders: list[Path], tmp_path: Path
) -> None:
    for name, workers in (("one", 1), ("four", 4)):
        made = recipe(folders, "dare-ties")
        merge(made, tmp_path / name, base=folders[0], workers=workers, shard_bytes=20_000)
    assert tree_hashes(tmp_path / "one") == tree_hashes(tmp_path / "four")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_a_broken_run_goes_on(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltafold.merging import merge as module

    made = recipe(folders, "dare-ties")
    merge(made, tmp_path / "whole", base=folders[0])
    true, calls = module.TensorMerge._one, []

    def breaks(self: Any, name: str, *rest: Any) -> None:
        calls.append(name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        true(self, name, *rest)

    monkeypatch.setattr(module.TensorMerge, "_one", breaks)
    with pytest.raises(KeyboardInterrupt):
        merge(made, tmp_path / "out", base=folders[0], workers=1)
    assert not (tmp_path / "out").exists()
    done = len(calls) - 1
    merge(made, tmp_path / "out", base=folders[0], workers=1)
    assert len(calls) == 8 + len(states(folders)[0]) - done
    assert tree_hashes(tmp_path / "out") == tree_hashes(tmp_path / "whole")


def test_numbers_by_block_and_role() -> None:
    up, query = "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert value_at([0, 1], up, 5) == 0.5
    assert value_at([0, 1, 5], "model.layers.3.mlp.up_proj.weight", 5) == 3.0
    assert value_at([1, 2], "model.embed_tokens.weight", 5) == 1
    assert value_at([1, 2], "model.norm.weight", 5) == 2
    table = {"attention": 0.4, "mlp": [0, 1], "blocks 0-1": 0.1, "default": 9}
    assert value_at(table, query, 5) == 0.1
    assert value_at(table, up, 5) == 0.5
    assert value_at(table, "model.norm.weight", 5) == 9


def test_agreement_by_hand() -> None:
    """Signs: both +, both -, apart, one alone, none: two of three shared entries agree."""
    found = agreement([torch.tensor([3.0, -1, 2, 0, 0]), torch.tensor([4.0, -2, -1, 5, 0])])
    assert found["norms"] == pytest.approx([14**0.5, 46**0.5])
    assert found["cosines"] == pytest.approx([(12 + 2 - 2) / (14 * 46) ** 0.5])
    assert found["agreed"] == pytest.approx(2 / 3)
    zeros = agreement([torch.zeros(3), torch.ones(3)])
    assert zeros["agreed"] is None and zeros["cosines"] == [0.0]
    assert agreement([torch.ones(2)])["cosines"] == []


def test_weights_reach_their_tensors(folders: list[Path], tmp_path: Path) -> None:
    weight = {"mlp": 0.0, "default": 1.0}
    merge(
        Recipe((Model(str(folders[1]), weight),), "task-arithmetic"),
        tmp_path / "out",
        base=folders[0],
    )
    base, tuned = states(folders)[:2]
    for name, found in load_file(tmp_path / "out/model.safetensors").items():
        wanted = base if ".mlp." in name else tuned
        assert torch.allclose(found.float(), wanted[name].float(), rtol=2**-8), name


OWN = """
base: {base}
method: dare-ties
scale: {{blocks 0-999999: [0.5, 1], default: 0.5}}
numbers: {{normalize: 0, sign_of_zero: 1}}
models:
  - path: {one}
    weight: 0.7
    density: {{mlp: 0.4, default: 0.2}}
  - path: {two}
    density: 1
"""
MERGEKITS = """
merge_method: dare_ties
base_model: {base}
models:
  - model: {base}
  - model: {one}
    parameters:
      weight: 0.7
      density:
        - filter: mlp
          value: 0.4
        - value: 0.2
  - model: {two}
    parameters: {{weight: 1}}
parameters: {{lambda: [0.5, 1], int8_mask: true}}
dtype: bfloat16
"""


def test_recipes_from_files(folders: list[Path], tmp_path: Path, deltafold: Any) -> None:
    """Ours and mergekit's say the same, and give the same bytes."""
    named = dict(zip(("base", "one", "two"), folders, strict=False))
    made = []
    for name, text in (("ours", OWN), ("theirs", MERGEKITS)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.format(**named))
        made.append(read_recipe(path))
        done = deltafold("merge", "--config", path, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert made[0][0] == made[1][0] == str(folders[0])
    assert made[0][1].to_json() == made[1][1].to_json() | {"models": made[0][1].to_json()["models"]}
    assert tree_hashes(tmp_path / "ours") == tree_hashes(tmp_path / "theirs")


def test_all_mistakes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("method: tie\nscales: 1\nmodels: [{paht: a}]")
    with pytest.raises(UsageError) as refused:
        read_recipe(path)
    for words in ("'scales'", "'paht'", "needs a path", "needs a base", "'tie'"):
        assert words in str(refused.value)
    path.write_text("merge_method: model_stock\nmodels: [{model: a, parameters: {wieght: 1}}]")
    with pytest.raises(UsageError, match=r"'model_stock' is not read here.*'wieght'"):
        read_recipe(path)
    path.write_text("a: [")
    with pytest.raises(UsageError, match="is not YAML"):
        read_recipe(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_all_mistakes_at_once() -> None:
    models = (Model("a", "x"), Model("b", {"mlps": 1}, density=2.0))
    with pytest.raises(UsageError) as refused:
        Recipe(models, "ties", sparsifier="dear", scale=[], numbers={"epsilom": 1})
    for words in ("dare", "weight of a", "'mlps'", "needs a default", "density of b", "scale",
                  "epsilon"):  # fmt: skip
        assert words in str(refused.value)
    with pytest.raises(UsageError, match="did you mean 'ties'"):
        Recipe(models, "tie")
    with pytest.raises(UsageError, match="slerp takes two models, not 3"):
        Recipe((Model("a"), Model("b"), Model("c")), "slerp")


def test_models_that_do_not_fit(folders: list[Path], tmp_path: Path) -> None:
    other = make_llama(5)
    other.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(65, 32))
    wide = save(other.bfloat16(), tmp_path / "wide")
    with pytest.raises(
        MismatchError, match=r"up_proj\.weight is \[65, 32\] in .* merge fine-tunes"
    ):
        merge(recipe([folders[0], wide]), tmp_path / "out", base=folders[0])
    state = states(folders)[1]
    del state["model.norm.weight"]
    from safetensors.torch import save_file

    (tmp_path / "less").mkdir()
    save_file(state, tmp_path / "less/model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"lacks the tensor model\.norm\.weight"):
        merge(recipe([folders[0], tmp_path / "less"]), tmp_path / "out", base=folders[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["less", "wide"]


def test_the_command(folders: list[Path], tmp_path: Path, deltafold: Any) -> None:
    out = tmp_path / "out"
    done = deltafold(
        "merge",
        *folders,
        "-o",
        out,
        "-m",
        "dare-ties",
        "--weight",
        "0.5",
        "--density",
        "[0.2, 0.9]",
    )
    assert done.returncode == 0, done.stderr
    assert "3 models by dare-ties (dare, ties)" in done.stdout
    record = json.loads((tmp_path / "out.record.json").read_text())
    assert record["recipe"]["models"][2] == {
        "path": str(folders[3]), "weight": 0.5, "density": [0.2, 0.9]
    }  # fmt: skip
    wrong = deltafold("merge", *folders, "-o", tmp_path / "x", "--weight", "1", "--weight", "2")
    assert wrong.returncode != 0 and "given 2 times for 3 models" in wrong.stderr
    wrong = deltafold("merge", *folders, "-o", tmp_path / "x", "--scale", "big")
    assert wrong.returncode != 0 and "--scale 'big' is not a number" in wrong.stderr
    assert not (tmp_path / "x").exists()
