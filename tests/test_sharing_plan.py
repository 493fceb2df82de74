"""Plans of shared blocks: which, at what rank, and the exact count."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafold.blocks.structure import Layer, Structure
from deltafold.errors import BudgetError, MismatchError, UsageError
from deltafold.sharing.job import plan_sharing, structure_of
from deltafold.sharing.methods.plan import Plan, make_plan
from deltafold.sharing.request import METHODS, ShareRequest

PHI_3_MINI: dict[str, Any] = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
    "tie_word_embeddings": False, "pad_token_id": 32000,
}  # fmt: skip
LLAMA_3B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "tie_word_embeddings": True,
}  # fmt: skip


def small(depth: int = 12, stacked: bool = False) -> Structure:
    """Blocks with an MLP of 3 x (8 x 4) and an attention of 2 x (4 x 4)."""
    layers = (
        Layer("mlp.gate_proj", "mlp", (8, 4), (8,), False, False),
        Layer("mlp.up_proj", "mlp", (8, 4), (8,), False, False),
        Layer("mlp.down_proj", "mlp", (4, 8), (4,), False, False),
        Layer("attn.q_proj", "attention", (4, 4), (4,), False, False),
        Layer("attn.o_proj", "attention", (4, 4), (4,), False, False),
    )
    names = tuple(f"layers.{n}" for n in range(depth))
    return Structure("small", "none", names, (layers,) * depth, stacked, 4, depth * 128 + 1000)


def asked(method: str = "deltallm", **options: Any) -> ShareRequest:
    """What is asked of a model without scales of rows, so that counts are those of factors alone."""
    return ShareRequest("model", "output", method, **{"row_scale": False, **options})


def pairs(plan: Plan) -> list[tuple[int, int | None]]:
    return [(place.block, place.anchor) for place in plan.places]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("config", "shared", "rank", "base", "stored"),
    [
        (PHI_3_MINI, 13, 100, "3.8211", "2.884"),
        (PHI_3_MINI, 7, 256, "3.8211", "3.353"),
        (LLAMA_3B, 10, 200, "3.2127", "2.525"),
    ],
)
def test_published_sizes(
    tmp_path: Path, config: dict[str, Any], shared: int, rank: int, base: str, stored: str
) -> None:
    path = tmp_path / "phi.json"
    path.write_text(json.dumps(config))
    found = plan_sharing(ShareRequest(path, "output", shared=shared, rank=rank))
    assert f"{found['base_parameters'] / 1e9:.4f}" == base
    assert f"{found['parameters'] / 1e9:.3f}" == stored
    if shared == 13:
        assert round(found["delta_parameters"] * 2 / 1e6) == 88


def test_the_count_is_the_formula() -> None:
    plan = make_plan(small(), asked(shared=2, rank=3))
    # shared: 2 x 3 x 32; deltas: 2 x 3 matrices x 3 x (8 + 4)
    assert plan.shared_parameters == 192
    assert plan.delta_parameters == 216
    assert plan.parameters == small().parameters - 192 + 216


def test_placements() -> None:
    assert pairs(make_plan(small(), asked(shared=3, rank=1))) == [(5, 4), (7, 6), (9, 8)]
    sequential = make_plan(small(), asked(shared=3, rank=1, placement="sequential"))
    assert pairs(sequential) == [(7, 6), (8, 6), (9, 6)]
    costs = {2: 0.5, 3: 0.1, 4: 0.2, 5: 0.05, 6: 0.3, 7: 0.9, 8: 0.01, 9: 0.02}
    searched = make_plan(small(), asked(shared=3, rank=1, placement="searched"), costs)
    # 8 first, then 9, then 5; before 9 stands a delta, so it refers to 7, too
    assert pairs(searched) == [(5, 4), (8, 7), (9, 7)]
    every = {block for plan in (sequential, searched) for block, _ in pairs(plan)}
    assert not every & {0, 1, 10, 11}


@pytest.mark.parametrize("placement", ["alternating", "sequential", "searched"])
def test_an_anchor_is_never_a_delta(placement: str) -> None:
    costs = {block: (7 * block % 11) / 11 for block in range(1, 13)}
    for shared in range(1, 5):
        request = asked(shared=shared, rank=1, placement=placement)
        plan = make_plan(small(13), request, costs)
        assert not {b for b, _ in pairs(plan)} & {anchor for _, anchor in pairs(plan)}
        assert all(anchor < block for block, anchor in pairs(plan) if anchor is not None)


@settings(deadline=None)
@given(share=st.floats(0.83, 0.97), matrices=st.sampled_from(["mlp", "attention", "both"]))
def test_a_share_of_parameters_is_met_from_below(share: float, matrices: str) -> None:
    structure = small()
    try:
        plan = make_plan(structure, asked(parameters=share, matrices=matrices))
    except BudgetError as error:
        assert "%" in str(error)
        return
    assert plan.parameters <= share * structure.parameters
    # One rank more in each block would not fit.
    more = sum(
        layer.factor_cost(1)
        for place in plan.places
        for layer in structure.of(place.block, plan.parts)
    )
    full = all(place.read_rank >= 4 for place in plan.places)
    assert full or plan.parameters + more > share * structure.parameters


@pytest.mark.parametrize("method", METHODS)
def test_controls_store_as_many_parameters(method: str) -> None:
    structure = small()
    plan = make_plan(structure, asked(method, shared=4, rank=1))
    main = make_plan(structure, asked(shared=4, rank=1))
    assert 0 <= main.parameters - plan.parameters < 36  # one rank of one block
    assert plan.parameters == structure.parameters - plan.shared_parameters + plan.delta_parameters
    anchors = {place.anchor for place in plan.places}
    assert (anchors == {None}) == (method in ("no-anchor", "drop-mlp"))
    form = plan.form()
    stored = sum(math.prod(s) for layer in form.linears.values() for _, s in layer.tensors(""))
    assert stored == plan.delta_parameters


def test_a_split_of_ranks_costs_no_more() -> None:
    structure = small()
    even = make_plan(structure, asked(shared=3, rank=3))
    for split in (0.5, 2.0):
        plan = make_plan(structure, asked(shared=3, rank=3, split=split))
        place = plan.places[0]
        assert plan.delta_parameters <= even.delta_parameters
        assert (place.write_rank > place.read_rank) == (split > 1)


def test_what_cannot_be_is_refused_with_what_could() -> None:
    structure = small()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"shared": 5, "rank": 1}, BudgetError, "at most 4"),
        ({"parameters": 0.3}, BudgetError, "ask for a larger"),
        ({"shared": 1, "rank": 9}, UsageError, "more than these matrices have"),
        ({"shared": 1}, UsageError, "Say how much"),
        ({"parameters": 1.5}, UsageError, "between 0 and 1"),
        ({"method": "deltalm", "shared": 1, "rank": 1}, UsageError, "did you mean 'deltallm'"),
        ({"shared": 1, "rank": 1, "placement": "searched"}, UsageError, "use share"),
        ({"shared": 1, "rank": 1, "protect": (40,)}, UsageError, "blocks 0 to 11"),
        ({"shared": 1, "rank": 1, "protect": tuple(range(11))}, BudgetError, "protect fewer"),
        (
            {"method": "drop-mlp", "shared": 1, "rank": 1, "matrices": "both"},
            UsageError,
            "drops MLPs",
        ),
    ]
    for options, error, words in cases:
        with pytest.raises(error, match=words):
            make_plan(structure, asked(**options))
    with pytest.raises(MismatchError, match="--matrices attention"):
        make_plan(small(stacked=True), asked(shared=1, rank=1))


@pytest.mark.integration
def test_the_command_needs_a_config_alone(tmp_path: Path, deltafold: Run) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3B))
    made = deltafold("plan", tmp_path, "--method", "deltallm", "--shared", 10, "--rank", 200)
    assert made.returncode == 0, made.stderr
    assert "2,525,359,104" in made.stdout
    assert "block 24" in made.stdout
    structure = structure_of(tmp_path)
    assert structure.depth == 28
    scaled = deltafold(
        "plan", tmp_path, "--method", "deltallm", "--shared", 1, "--rank", 2, "--scale"
    )
    assert scaled.returncode == 0 and "--scale is called --row-scale now" in scaled.stderr
    for arguments, words in (
        ([tmp_path, "--method", "deltallm", "--shared", 40, "--rank", 3], "at most 12"),
        ([tmp_path], "Give the fine-tune"),
        ([tmp_path / "none", "--method", "tie", "--shared", 1, "--rank", 1], "does not exist"),
    ):
        made = deltafold("plan", *arguments)
        assert made.returncode
        assert words in made.stderr
        assert len(made.stderr.strip().splitlines()) == 1 or "torch" in made.stderr
