"""What stands in the place of blocks, on blocks of a few numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from deltafold.blocks.align import match
from deltafold.blocks.layout import find_layout
from deltafold.blocks.units import Heads, find_units
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.rules import RULES, aligned

WIDTH, NEURONS = 4, 6
SHAPES = {
    "norm.weight": (WIDTH,),
    "self_attn.q_proj.weight": (8, WIDTH),
    "self_attn.q_proj.bias": (8,),
    "self_attn.k_proj.weight": (4, WIDTH),
    "self_attn.v_proj.weight": (4, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, 8),
    "mlp.gate_proj.weight": (NEURONS, WIDTH),
    "mlp.up_proj.weight": (NEURONS, WIDTH),
    "mlp.down_proj.weight": (WIDTH, NEURONS),
    "mlp.down_proj.bias": (WIDTH,),
    "something.new": (3,),
}
KEPT = ("norm.weight", "something.new")
"""What is neither attention nor MLP."""
LAYOUT = find_layout({f"layers.{n}.{k}": s for n in range(3) for k, s in SHAPES.items()}, 3)
UNITS = find_units(LAYOUT, Heads(4, 2, WIDTH))


def block(number: int) -> Block:
    generator = torch.Generator().manual_seed(number)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return Block(number, tensors.__getitem__, (number,))


def blend(rule: str, *blocks: Block, share: float = 0.5) -> Block:
    return RULES[rule].blend(blocks[0], blocks[1:], share, UNITS)


def mlp(of: Block, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (of.read(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T + of.read(
        "mlp.down_proj.bias"
    )


def attention(of: Block, x: torch.Tensor) -> torch.Tensor:
    """4 query heads of width 2 over 2 key/value heads."""
    q = (x @ of.read("self_attn.q_proj.weight").T + of.read("self_attn.q_proj.bias")).view(-1, 4, 2)
    k, v = (
        (x @ of.read(f"self_attn.{n}_proj.weight").T).view(-1, 2, 2).repeat_interleave(2, 1)
        for n in "kv"
    )
    weights = torch.einsum("thd,shd->hts", q, k).softmax(-1)
    mixed = torch.einsum("hts,shd->thd", weights, v).flatten(1)
    return mixed @ of.read("self_attn.o_proj.weight").T


@pytest.mark.parametrize("local", SHAPES)
def test_an_average_is_the_weighted_sum_of_every_tensor(local: str) -> None:
    """The released program never writes its sum, and passes over names that it does not know."""
    a, b = block(0), block(1)
    made = blend("average", a, b, share=0.7)
    assert torch.allclose(made.read(local), 0.7 * a.read(local) + 0.3 * b.read(local), atol=1e-6)
    assert not torch.equal(made.read(local), a.read(local))
    assert made.parts == (0, 1) and made.number == 0


def test_several_share_the_rest() -> None:
    made = blend("average", block(0), block(1), block(2), share=0.5)
    for local in SHAPES:
        a, b, c = (block(n).read(local) for n in range(3))
        assert torch.allclose(made.read(local), 0.5 * a + 0.25 * b + 0.25 * c, atol=1e-6)


def test_the_reference_averages_projections_only() -> None:
    made = blend("average-matrices", block(0), block(1), share=0.6)
    for local in SHAPES:
        a, b = block(0).read(local), block(1).read(local)
        projection = local.endswith("proj.weight")
        wanted = 0.6 * a + 0.4 * b if projection else a
        assert torch.allclose(made.read(local), wanted, atol=1e-6), local
    assert sum(local.endswith("proj.weight") for local in SHAPES) == 7


def test_collapse_adds_differences_to_what_was() -> None:
    """theta_0 + (theta_1 - theta_0) + (theta_2 - theta_0); taken one after the other against the
    changed block the sum would end as theta_2 alone."""
    made = blend("collapse", block(0), block(1), block(2))
    for local in SHAPES:
        a, b, c = (block(n).read(local) for n in range(3))
        if local in KEPT:
            assert torch.equal(made.read(local), a)
            continue
        assert torch.allclose(made.read(local), b + c - a, atol=1e-6)
        assert not torch.allclose(made.read(local), c, atol=1e-3)


def test_laco_by_hand() -> None:
    """1 + (4 - 1) + (2 - 1) = 5 in the paper; in the program 1 + (4 - 1) = 4, 4 + (2 - 4) = 2."""

    def one(number: int, value: float) -> Block:
        tensors = {
            "mlp.up_proj.weight": torch.tensor([[value]]),
            "norm.weight": torch.tensor([value]),
        }
        return Block(number, tensors.__getitem__, (number,))

    blocks = [one(0, 1.0), one(1, 4.0), one(2, 2.0)]
    for rule, wanted in (("collapse", 5.0), ("telescope", 2.0)):
        made = RULES[rule].blend(blocks[0], blocks[1:], 0.5, [])
        assert made.read("mlp.up_proj.weight").item() == wanted
        assert made.read("norm.weight").item() == 1.0


def test_the_program_of_laco_leaves_the_last_block_under_the_first_norms() -> None:
    """Written as the program has it: every difference against the sum so far."""
    made = blend("telescope", block(0), block(1), block(2))
    for local in SHAPES:
        kept = block(0).read(local)
        total = kept.clone()
        for n in (1, 2):
            total += block(n).read(local) - total
        wanted = kept if local in KEPT else total
        assert torch.allclose(made.read(local), wanted, atol=1e-6), local
    assert made.parts == (0, 1, 2)


@pytest.mark.parametrize("rule", ["drop", "replace-me", "replace-me-cosine", "scale"])
def test_what_is_dropped_leaves_no_trace(rule: str) -> None:
    kept = block(0)
    assert blend(rule, kept, block(1)) is kept


def test_the_best_matching_by_trying_all() -> None:
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(5, 3, generator=generator).double() for _ in range(2))
    gains = one @ other.T
    best = max(
        itertools.permutations(range(5)), key=lambda p: sum(gains[i, p[i]] for i in range(5))
    )
    assert match(one, other).tolist() == list(best)


def test_aligning_keeps_what_a_block_computes_and_finds_a_permutation() -> None:
    first = block(0)
    order, groups = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([1, 0])

    def shuffled(local: str) -> torch.Tensor:
        tensor = first.read(local)
        if local in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            return tensor[order]
        if local == "mlp.down_proj.weight":
            return tensor[:, order]
        for name in "qkv":
            if local.startswith(f"self_attn.{name}_proj"):
                return tensor.view(2, -1, *tensor.shape[1:])[groups].reshape(tensor.shape)
        if local == "self_attn.o_proj.weight":
            return tensor.view(WIDTH, 2, 4)[:, groups].reshape(tensor.shape)
        return tensor

    other = Block(1, shuffled, (1,))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(mlp(other, x), mlp(first, x), atol=1e-5)
    assert torch.allclose(attention(other, x), attention(first, x), atol=1e-5)
    back = aligned(other, first, UNITS)
    for local in SHAPES:
        assert torch.equal(back.read(local), first.read(local)), local
    stranger = aligned(block(2), first, UNITS)
    assert torch.allclose(mlp(stranger, x), mlp(block(2), x), atol=1e-5)
    assert torch.allclose(attention(stranger, x), attention(block(2), x), atol=1e-5)


def test_averaging_aligned_blocks_is_averaging_where_units_are_in_order() -> None:
    a = block(0)
    made = blend("aligned-average", a, a)
    assert all(torch.allclose(made.read(local), a.read(local), atol=1e-6) for local in SHAPES)


def test_fused_and_transposed_tensors_have_the_same_units() -> None:
    fused = {"self_attn.qkv_proj.weight": (16, 4), "self_attn.o_proj.weight": (4, 8),
             "mlp.gate_up_proj.weight": (12, 4), "mlp.down_proj.weight": (4, 6)}  # fmt: skip
    layout = find_layout({f"layers.{n}.{k}": s for n in range(2) for k, s in fused.items()}, 2)
    neurons, heads = find_units(layout, Heads(4, 2, 4))
    assert (neurons.count, heads.count) == (6, 2)
    assert [(s.axis, s.start, s.each) for s in neurons.slices] == [(0, 0, 1), (0, 6, 1)]
    assert [(s.start, s.each) for s in heads.slices] == [(0, 4), (8, 2), (12, 2)]
    turned = {"attn.c_attn.weight": (4, 12), "attn.c_attn.bias": (12,), "attn.c_proj.weight": (4, 4),
              "attn.c_proj.bias": (4,), "mlp.c_fc.weight": (4, 16), "mlp.c_fc.bias": (16,),
              "mlp.c_proj.weight": (16, 4), "mlp.c_proj.bias": (4,)}  # fmt: skip
    layout = find_layout({f"h.{n}.{k}": s for n in range(2) for k, s in turned.items()}, 2)
    neurons, heads = find_units(layout, Heads(2, 2, 4))
    assert neurons.count == 16
    assert {(s.local, s.axis) for s in neurons.all_slices} == {
        ("mlp.c_fc.weight", 1), ("mlp.c_fc.bias", 0), ("mlp.c_proj.weight", 0)}  # fmt: skip
    assert {(s.local, s.axis, s.start) for s in heads.slices} == {
        (f"attn.c_attn.{kind}", axis, start) for kind, axis in (("weight", 1), ("bias", 0))
        for start in (0, 4, 8)}  # fmt: skip
    assert heads.outputs[0].axis == 0


def test_a_draft_computes_when_asked_and_never_changes() -> None:
    reads: list[str] = []

    def source(name: str) -> torch.Tensor:
        reads.append(name)
        return torch.tensor([float(name.split(".")[1])])

    layout = find_layout({f"layers.{n}.x": (1,) for n in range(4)} | {"head": (1,)}, 4)
    whole = Draft.of(layout, source)
    merged = whole.with_block(
        RULES["average"].blend(whole.block(1), [whole.block(2)], 0.5, [])
    ).without([2])
    assert reads == [] and merged.numbers == [0, 1, 3] and whole.numbers == [0, 1, 2, 3]
    assert merged.tensor("layers.1.x").item() == 1.5 and whole.tensor("layers.1.x").item() == 1
    again = merged.with_block(
        RULES["average"].blend(merged.block(1), [merged.block(3)], 0.5, [])
    ).without([3])
    assert again.tensor("layers.1.x").item() == 0.5 * 1.5 + 0.5 * 3
    assert again.block(1).parts == (1, 2, 3)
    with pytest.raises(ValueError):
        merged.tensor("layers.2.x")
