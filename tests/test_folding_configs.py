"""Blocks told from names, and configs that follow."""

from __future__ import annotations

import pytest

from deltafold.blocks.configs import depth_of, readings, shortened
from deltafold.blocks.layout import find_layout
from deltafold.errors import DeltafoldWarning, MismatchError, UsageError
from deltafold.folding.methods.presets import METHODS, Method
from deltafold.folding.methods.selection import SELECTIONS
from deltafold.folding.methods.similarity import SIMILARITIES


def test_everything_said_of_blocks_follows() -> None:
    config = {
        "model_type": "x", "num_hidden_layers": 5, "layer_types": ["s", "s", "f", "s", "f"],
        "max_window_layers": 3, "mlp_only_layers": [1, 4], "no_rope_layers": [1, 1, 1, 0, 1],
        "eos_token_id": [1, 2, 3, 4, 5], "architectures": ["A"], "rope_scaling": {"f": [0] * 5},
        "layer_sizes": [1, 2], "hidden_size": 5,
    }  # fmt: skip
    made = shortened(config, [0, 1, 4])
    assert made == config | {
        "num_hidden_layers": 3, "layer_types": ["s", "s", "f"], "max_window_layers": 2,
        "mlp_only_layers": [1, 2], "no_rope_layers": [1, 1, 1],
    }  # fmt: skip
    assert config["num_hidden_layers"] == 5


def test_states_of_a_backbone_follow_the_blocks_they_come_after() -> None:
    names = ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"]
    config = {
        "num_hidden_layers": 5, "stage_names": names, "out_indices": [0, 2, 3, 5],
        "out_features": ["stem", "stage2", "stage3", "stage5"],
    }  # fmt: skip
    made = shortened(config, [0, 1, 4])
    assert made["stage_names"] == names[:4]
    assert made["out_indices"] == [0, 2, 3]
    assert made["out_features"] == ["stem", "stage2", "stage3"]


def test_a_config_inside_another() -> None:
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}, "vision": [1, 2]}
    assert depth_of(config) == 2
    assert shortened(config, [1]) == {
        "text_config": {"num_hidden_layers": 1, "layer_types": ["b"]}, "vision": [1, 2]
    }  # fmt: skip
    assert depth_of({"n_layer": 3}) == 3
    with pytest.raises(MismatchError, match="does not name one number of blocks"):
        depth_of({}, "mine/")


def test_a_deeper_tower_is_not_the_list() -> None:
    tower = {f"vision.layers.{n}.proj.weight": (9, 9) for n in range(4)}
    text = {f"text.layers.{n}.proj.weight": (2, 2) for n in range(2)}
    assert find_layout(tower | text, 2).prefix == "text.layers."
    alike = {name: shape for name, shape in tower.items() if "0" in name or "1" in name}
    assert find_layout(alike | text, 2).prefix == "text.layers."
    assert find_layout(alike, 2).prefix == "vision.layers."


def test_blocks_are_the_outermost_list() -> None:
    names = {
        f"model.layers.{n}.mlp.experts.{e}.w1.weight": (2, 2) for n in range(2) for e in (0, 1)
    }
    layout = find_layout(names | {"model.embed_tokens.weight": (9, 2), "lm_head.weight": (9, 2)}, 2)
    assert layout.prefix == "model.layers." and len(layout.shapes) == 2
    assert layout.outside == ("model.embed_tokens.weight", "lm_head.weight")
    assert (layout.parameters, layout.total) == (8, 16 + 36)
    assert layout.split("model.layers.1.mlp.experts.0.w1.weight") == (1, "mlp.experts.0.w1.weight")
    assert layout.split("lm_head.weight") is None
    tower = {f"vision.blocks.{n}.x": (1,) for n in range(2)}
    assert find_layout(tower | names, 2).prefix == "model.layers."


def test_the_larger_list_has_the_config_s_length() -> None:
    names = {f"a.{n}.x": (50,) for n in range(2)} | {f"h.{n}.x": (1,) for n in range(3)}
    assert find_layout(names, 3).prefix == "h."


def test_blocks_that_differ_are_refused_by_name() -> None:
    names = {"layers.0.up_proj.weight": (4, 2), "layers.1.up_proj.weight": (6, 2)}
    with pytest.raises(
        MismatchError, match=r"layers\.1\.up_proj\.weight is \[6, 2\], but \[4, 2\]"
    ):
        find_layout(names, 2)
    with pytest.raises(MismatchError, match=r"layers\.1\.y has no counterpart in block 0"):
        find_layout({"layers.0.x": (1,), "layers.1.x": (1,), "layers.1.y": (1,)}, 2)
    with pytest.raises(MismatchError, match=r"layers\.1\.y is missing"):
        find_layout({"layers.0.x": (1,), "layers.0.y": (1,), "layers.1.x": (1,)}, 2)
    with pytest.raises(MismatchError, match="no list of 3 blocks"):
        find_layout(names, 3)
    with pytest.raises(MismatchError, match="additional block"):
        find_layout({f"layers.{n}.x": (1,) for n in range(3)}, 2)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_of_known_rows(name: str) -> None:
    made = Method.of(name)
    assert made.preset.similarity in SIMILARITIES and made.preset.selection in SELECTIONS
    assert made.rule is not None


def test_methods_that_cannot_be() -> None:
    for arguments, words in [
        (("shortgtp",), "did you mean 'shortgpt'"),
        (("mka", "cosin"), "no similarity 'cosin'.*did you mean 'cosine'"),
        (("mka", None, "lowst"), "no selection 'lowst'"),
        (("mka", None, None, "averag"), "no rule 'averag'.*average"),
        (("shortgpt", "perplexity"), "compares states"),
        (("jointdrop", None, None, "average"), "does not suit the selection joint"),
        (("laco", None, None, "drop"), "folds blocks together"),
    ]:
        with pytest.raises(UsageError, match=words):
            Method.of(*arguments)
    assert Method.of("mka", "cka").preset.similarity == "cka"


def test_an_old_name_works_with_a_word() -> None:
    with pytest.warns(DeltafoldWarning, match="linearpatch is called linearpatch-scale"):
        made = Method.of("linearpatch")
    assert made == Method.of("linearpatch-scale")
    with pytest.warns(DeltafoldWarning, match="for which an ordinary model has no place"):
        assert Method.of("angular", rule="linear-patch").preset.rule == "scale"


def test_numbers_of_all_blocks_are_numbers() -> None:
    config = {"num_hidden_layers": 4, "moe_layers": [0, 1, 2, 3], "full_attn_idxs": [3, 0],
              "no_rope_layers": [1, 1, 1, 0]}  # fmt: skip
    made = shortened(config, [0, 2, 3])
    assert made["moe_layers"] == [0, 1, 2] and made["full_attn_idxs"] == [2, 0]
    assert made["no_rope_layers"] == [1, 1, 0]


def test_derived_lists_are_written_out() -> None:
    config = {"num_hidden_layers": 4, "layer_types": None}
    derived = {"layer_types": ["s", "f", "s", "f"], "moe_layers": [1, 3], "sizes": [1, 2]}
    made = shortened(config, [1, 2, 3], derived)
    assert made == {"num_hidden_layers": 3, "layer_types": ["f", "s", "f"], "moe_layers": [0, 2]}


def test_counts_of_the_last_blocks() -> None:
    config = {"num_hidden_layers": 5, "num_kv_shared_layers": 2}
    assert shortened(config, [0, 1, 4])["num_kv_shared_layers"] == 1


def test_two_readings_of_a_list() -> None:
    """With two blocks [0, 1] may be values or numbers; both are offered."""
    config = {"num_hidden_layers": 2, "no_rope_layers": [0, 1]}
    made = shortened(config, [1])
    others = [each["no_rope_layers"] for each in readings(config, made, [1])]
    assert made["no_rope_layers"] == [0] and [1] in others
