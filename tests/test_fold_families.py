"""Every family: folded, saved, loaded with transformers alone, and generating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_checkpoint
from folding_models import DEPTH, TYPES, write_deep, write_text
from tiny_models import FAMILIES

from deltafold import fold
from deltafold.blocks.reading import read_layout
from deltafold.calibration import Sample, StreamedModel, make_batches
from deltafold.checkpoint import open_checkpoint
from deltafold.folding.methods.draft import Draft
from deltafold.folding.methods.rules import aligned

pytestmark = pytest.mark.integration
Family = tuple[str, Path, Path]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("deep")
    return request.param, write_deep(folder / "model", request.param), write_text(folder / "text")


def open_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def generated(model: Any, use_cache: bool) -> list[int]:
    prompt = torch.arange(3, 15)[None]
    with torch.no_grad():
        made = model.generate(
            prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=use_cache
        )
    return made[0].tolist()


def check_whole(folder: Path, record: dict[str, Any]) -> None:
    """Loads with nothing missing, agrees with the block-wise run, generates with and without cache."""
    model = open_model(folder)
    assert model.config.num_hidden_layers == len(record["kept"])
    blocks = next(
        m for m in model.get_decoder().modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == len(record["kept"])
    )  # fmt: skip
    indices = [getattr(m, "layer_idx", None) for b in blocks for m in b.modules()]
    assert {each for each in indices if each is not None} <= set(range(len(blocks)))
    cached, plain = (generated(model, use_cache) for use_cache in (True, False))
    assert len(cached) == 24 and cached == plain


@pytest.mark.parametrize("method", ["mka", "auto", "jointdrop"])
def test_folded_saved_loaded_generating(family: Family, tmp_path: Path, method: str) -> None:
    _, model, text = family
    record = fold(
        model, tmp_path / "out", method, blocks=2, calibration=text, max_tokens=40, protect=[2]
    )
    check_whole(tmp_path / "out", record)
    old, new = read_checkpoint(model), read_checkpoint(tmp_path / "out")
    gone = len(record["removed"]["blocks"])
    blocks = [each for each in old if f".{DEPTH - 1}." in each]
    assert len(old) - len(new) == gone * len(blocks) and blocks
    assert {t.dtype for t in new.values()} == {t.dtype for t in old.values()}
    folded = open_model(tmp_path / "out")
    same = folded.get_output_embeddings().weight is folded.get_input_embeddings().weight
    assert same == bool(folded.config.tie_word_embeddings)
    assert ("lm_head.weight" in new) == ("lm_head.weight" in old)


def test_lists_of_the_config_follow(family: Family, tmp_path: Path) -> None:
    name, model, _ = family
    before = json.loads((model / "config.json").read_text())
    record = fold(model, tmp_path / "out", "random", blocks=2, seed=3, calibration="none")
    after = json.loads((tmp_path / "out/config.json").read_text())
    kept = record["kept"]
    if before.get("layer_types"):
        assert after["layer_types"] == [before["layer_types"][n] for n in kept]
    if name == "gemma3":
        assert before["layer_types"] == TYPES[:DEPTH]
        sliding = [b.self_attn.sliding_window for b in open_model(tmp_path / "out").model.layers]
        assert sliding == [32 if TYPES[n].startswith("s") else None for n in kept]
    assert set(after) == set(before)
    check_whole(tmp_path / "out", record)


def test_a_dropped_block_is_a_block_left_out(family: Family, tmp_path: Path) -> None:
    """The folder written is the very model that was run: the same logits."""
    _, model, _ = family
    record = fold(model, tmp_path / "out", "reverse", blocks=2, protect=[4], calibration="none")
    batches = make_batches([Sample(tuple(range(3, 30))), Sample(tuple(range(9, 40)))])
    streamed = StreamedModel(model)
    with streamed.forward(batches, blocks=record["kept"]) as done:
        wanted = torch.cat([rows for _, rows in streamed.logits(done)])
    written = StreamedModel(tmp_path / "out")
    with written.forward(batches) as done:
        found = torch.cat([rows for _, rows in written.logits(done)])
    assert torch.allclose(found, wanted, atol=1e-5)


def test_units_in_another_order_compute_the_same(family: Family) -> None:
    """Neurons, experts' neurons and head groups, fused or transposed: block 1 aligned to block 0."""
    name, model, _ = family
    checkpoint = open_checkpoint(model)
    layout, units = read_layout(checkpoint)
    kinds = {unit.name.split(".")[0] for unit in units}
    assert "heads" in kinds and len(kinds) >= 2, name
    known = {each.local for unit in units for each in unit.all_slices}
    matrices = {local for local, shape in layout.shapes.items() if len(shape) > 1}
    gates = {local for local in matrices if local.endswith(("gate.weight", "expert_gate.weight"))}
    assert matrices - known == gates
    whole = Draft.of(layout, checkpoint.tensor)
    turned = whole.with_block(aligned(whole.block(1), whole.block(0), units))
    local = next(each for each in layout.mlp_outputs() if each.endswith("weight"))
    assert not torch.equal(turned.block(1).read(local), whole.block(1).read(local))
    batches = make_batches([Sample(tuple(range(3, 30)))])
    streamed = StreamedModel(checkpoint)
    with (
        streamed.forward(batches) as one,
        streamed.with_weights(turned.tensor).forward(batches) as two,
    ):
        assert torch.allclose(one.last[0], two.last[0], rtol=1e-3, atol=1e-3 * one.last[0].std())


def test_silent_parts_add_nothing(family: Family) -> None:
    """With both outputs zero a block hands its input on, whatever the family."""
    _, model, _ = family
    checkpoint = open_checkpoint(model)
    layout, _ = read_layout(checkpoint)
    whole = Draft.of(layout, checkpoint.tensor)
    silent = whole.block(2).without_output(layout.mlp_outputs() + layout.attention_outputs())
    batches = make_batches([Sample(tuple(range(3, 30)))])
    streamed = StreamedModel(checkpoint).with_weights(whole.with_block(silent).tensor)
    with streamed.forward(batches, keep=True) as done:
        assert torch.equal(done.stores[2][0], done.stores[3][0])
        assert not torch.equal(done.stores[1][0], done.stores[2][0])
