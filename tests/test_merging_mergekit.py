"""mergekit's files: settings as they are meant there, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_models import make_llama, save

from deltafold import merge
from deltafold.errors import MismatchError, UsageError
from deltafold.merging.mergekit import METHODS, setting
from deltafold.merging.recipe import Model, Recipe, value_at
from deltafold.merging.recipe_files import read_recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY, UP = "model.layers.2.self_attn.q_proj.weight", "model.layers.4.mlp.up_proj.weight"
NORM = "model.layers.0.post_attention_layernorm.weight"


def read(folder: Path, method: str, models: list[dict[str, Any]], **whole: Any) -> Recipe:
    path = folder / "x.yaml"
    found = {"merge_method": method, "base_model": "a", "models": models}
    path.write_text(yaml.safe_dump(found | whole))
    return read_recipe(path)[1]


def model(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name} | ({"parameters": parameters} if parameters else {})


def test_linear_takes_the_first_as_base(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]")
    base, made = read_recipe(path)
    assert (base, made.method, [m.path for m in made.models]) == ("a", "average", ["a", "b"])


def test_the_base_has_no_delta(tmp_path: Path) -> None:
    made = read(tmp_path, "ties", [model("a"), model("b"), model("c")])
    assert [m.path for m in made.models] == ["b", "c"]


def test_filters_are_parts_of_names() -> None:
    """The first that is found counts, in the order of the list."""
    filters = [
        {"filter": "q_proj", "value": 0.1},
        {"filter": "attention", "value": 0.2},  # of a name: no attention role
        {"filter": "mlp", "value": 0.3},
        {"filter": "up_proj", "value": 0.4},
        {"value": 0.5},
    ]
    made = setting("weight", 1.0, {"weight": filters})
    found = [value_at(made, name, 5) for name in (QUERY, NORM, UP, HEAD)]
    assert found == [0.1, 0.2, 0.3, 0.5]


def test_a_gradient_runs_over_blocks_and_its_first_entry_is_outside() -> None:
    made = setting("weight", 1.0, {"weight": [0, 1]})
    found = [value_at(made, name, 5) for name in (EMBEDDING, NORM, QUERY, UP, HEAD)]
    assert found == [0, 0, 0.5, 1, 0]


def test_settings_are_looked_up_with_the_model_then_with_all_then_usual() -> None:
    only_mlp = {"weight": [{"filter": "mlp", "value": 0.3}]}
    assert value_at(setting("weight", 1.0, only_mlp), UP, 5) == 0.3
    assert value_at(setting("weight", 1.0, only_mlp), QUERY, 5) == 1.0
    assert value_at(setting("weight", 1.0, only_mlp, {"weight": 0.7}), QUERY, 5) == 0.7
    assert setting("weight", 1.0, {"weight": 0.2}, {"weight": 0.7}) == 0.2
    assert setting("weight", 1.0, {}, {"weight": {"filter": "*", "value": 0.4}}) == 0.4
    assert setting("weight", 1.0, {}, {}) == 1.0


def test_usual_numbers_are_theirs(tmp_path: Path) -> None:
    """Everything is kept if no density is given; which methods divide; what a sum of zero elects."""
    for method in set(METHODS) - {"slerp", "linear"}:
        made = read(tmp_path, method, [model("b", weight=0.5)])
        assert [made.density_at(m, UP, 5) for m in made.models] == [1.0]
        assert made.scale_at(UP, 5) == 1.0
        assert made.all_numbers()["normalize"] == (method in ("ties", "della"))
        elects = made.rules[1] == "ties"
        assert made.all_numbers().get("sign_of_zero", 0) == elects
    made = read(tmp_path, "ties", [model("b")], parameters={"normalize": False, "density": 0.3})
    assert made.all_numbers()["normalize"] == 0
    assert made.density_at(made.models[0], UP, 5) == 0.3


def test_numbers_of_della_and_breadcrumbs(tmp_path: Path) -> None:
    """Their epsilon is half of the paper's range of probabilities."""
    assert read(tmp_path, "della", [model("b")]).all_numbers()["epsilon"] == 0.3
    made = read(tmp_path, "della", [model("b", epsilon=0.05)])
    assert made.all_numbers()["epsilon"] == 0.1
    made = read(tmp_path, "breadcrumbs", [model("b", gamma=0.02), model("c", gamma=0.02)])
    assert made.all_numbers()["gamma"] == 0.02


def test_slerp_runs_from_the_base_to_the_other(tmp_path: Path) -> None:
    filters = [{"filter": "self_attn", "value": [0, 0.25]}, {"value": 0.4}]
    made = read(tmp_path, "slerp", [model("a"), model("b")], parameters={"t": filters})
    assert [m.path for m in made.models] == ["a", "b"]
    shares = [made.weight_at(made.models[1], name, 5) for name in (QUERY, HEAD)]
    assert shares == [0.125, 0.4]
    assert [made.weight_at(made.models[0], name, 5) for name in (QUERY, HEAD)] == [0.875, 0.6]


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("dare_ties", {"rescale": False}, "rescale is always True for dare_ties"),
        ("ties", {"rescale": True}, "rescale is always False for ties"),
        ("linear", {"normalize": False}, "linear without normalize is not read here"),
        ("breadcrumbs", {"gamma": "x"}, "gamma must be a number, not 'x'"),
        ("della", {"epsilon": None}, "epsilon must be a number, not None"),
        ("ties", {"weigth": 1}, "'weigth'"),
        ("ties", [1], "parameters must be a table"),
        ("ties", {"lambda": [{"filter": 3, "value": 1}]}, "conditions have a filter and a value"),
        ("ties", {"density": [{"filter": "mlp"}]}, "density of b must be a number"),
    ],
)
def test_refused(tmp_path: Path, method: str, parameters: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read(tmp_path, method, [model("b"), model("c")], parameters=parameters)


def test_numbers_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gamma must be the same for all models"):
        read(tmp_path, "breadcrumbs", [model("b", gamma=0.1), model("c", gamma=0.2)])
    path = tmp_path / "x.yaml"
    path.write_text("merge_method: model_stock\nmodels: [{model: a, parameters: {wieght: 1}}]")
    with pytest.raises(UsageError, match=r"'model_stock' is not read here.*'wieght'"):
        read_recipe(path)


SLICED = """
slices:
  - sources:
      - model: a
        layer_range: [0, {n}]
      - model: b
        layer_range: [0, {n}]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5]
    - value: 0.3
dtype: bfloat16
"""


def test_one_slice_of_all_blocks_is_the_models(tmp_path: Path) -> None:
    """The way that files for slerp are mostly written."""
    path = tmp_path / "x.yaml"
    path.write_text(SLICED.format(n=32))
    base, sliced = read_recipe(path)
    plain = "models: [{model: a}, {model: b}]\n" + SLICED[SLICED.index("merge_method") :]
    path.write_text(plain)
    _, whole = read_recipe(path)
    assert base == "a" and sliced.blocks == 32 and whole.blocks is None
    assert sliced.to_json() == whole.to_json()


@pytest.mark.parametrize(
    "slices",
    [
        "[{sources: [{model: a, layer_range: [0, 8]}]}, {sources: [{model: b, layer_range: [8, 16]}]}]",
        "[{sources: [{model: a, layer_range: [0, 8]}, {model: b, layer_range: [0, 9]}]}]",
        "[{sources: [{model: a, layer_range: [4, 8]}]}]",
        "[{sources: [a]}]",
        "[]",
        "3",
    ],
)
def test_other_slices_are_refused(slices: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"merge_method: linear\nbase_model: a\nslices: {slices}\n")
    with pytest.raises(UsageError, match="slices are read where there is one"):
        read_recipe(path)


def test_slices_must_take_all_blocks(tmp_path: Path) -> None:
    base = save(make_llama(1).bfloat16(), tmp_path / "base")
    with pytest.raises(MismatchError, match="has 2 blocks, but the slices take 3"):
        merge(Recipe((Model(str(base)),), "average", blocks=3), tmp_path / "out", base=base)
