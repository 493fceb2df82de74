"""CoMe's concatenation against its formulas, on blocks of a few numbers."""

from __future__ import annotations

import pytest
import torch

from deltafold.blocks.layout import find_layout
from deltafold.blocks.units import Heads, Units, find_units
from deltafold.folding.methods.concatenation import influences as shares_of
from deltafold.folding.methods.concatenation import scores, widths
from deltafold.folding.methods.draft import Block, Shown
from deltafold.folding.methods.norms import Norm
from deltafold.folding.methods.rules import RULES

Tensors = dict[str, torch.Tensor]
UP, DOWN, NORM = "mlp.up_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight"


def units_of(tensors: Tensors, heads: Heads) -> list[Units]:
    shapes = {f"layers.{n}.{k}": tuple(t.shape) for n in range(2) for k, t in tensors.items()}
    return find_units(find_layout(shapes, 2), heads)


def block(number: int, tensors: Tensors, shown: Shown | None) -> Block:
    return Block(number, tensors.__getitem__, (number,), shown=shown)


def small(up: list[list[float]], down: list[list[float]], gain: list[float]) -> Tensors:
    return {UP: torch.tensor(up).float(), DOWN: torch.tensor(down).float(),
            NORM: torch.tensor(gain).float()}  # fmt: skip


LOWER = small([[1, 2], [3, 4], [5, 6], [7, 8]], [[1, -2, 0, 3], [-3, 1, 1, 0]], [2, 1])
UPPER = small([[1, 1], [2, 2], [3, 3], [4, 4]], [[5, 1, 0, 1], [0, 1, 1, 2]], [1, 3])
ACTIVITY = (torch.tensor([[1.0], [2], [3], [1]]), torch.tensor([[1.0], [4], [1], [2]]))
"""Scores: the lower 1 x 4, 2 x 3, 3 x 1, 1 x 3; the upper 1 x 5, 4 x 2, 1 x 1, 2 x 3."""


def shown(influence: float, activity: torch.Tensor, offset: float = 0.0) -> Shown:
    return Shown(influence, {"mlp": activity}, {UP: Norm(NORM, None, offset)})


def test_a_score_is_activation_times_outgoing_weights() -> None:
    units = units_of(LOWER, Heads(0, 0, 2))
    found = scores(units[0], block(0, LOWER, shown(1, ACTIVITY[0])))
    assert found.tolist() == [4, 6, 3, 3]
    assert scores(units[0], block(0, LOWER, None)).tolist() == [4, 3, 1, 3]


@pytest.mark.parametrize(
    ("influences", "count", "wanted"),
    [
        ([0.3, 0.1], 4, [3, 1]),
        ([1, 1], 3, [2, 1]),
        ([0.7, 0.3], 3, [2, 1]),
        ([0.0, 0.0], 4, [2, 2]),
        ([0.2, 0.0], 3, [3, 0]),
        ([1, 2, 3], 6, [1, 2, 3]),
    ],
)
def test_widths_are_in_proportion_to_influences(
    influences: list[float], count: int, wanted: list[int]
) -> None:
    blocks = [block(n, LOWER, shown(each, ACTIVITY[0])) for n, each in enumerate(influences)]
    assert widths(shares_of(blocks).tolist(), count) == wanted


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_strongest_neurons_stand_side_by_side_under_one_norm(offset: float) -> None:
    """Influences 3 to 1: three neurons of the lower block, 0, 1 and (of equals) 2; neuron 1 of the
    upper, whose row is (2, 2) x g_upper / g_lower = (2, 2) x (1 / 2, 3 / 1).
    """
    units = units_of(LOWER, Heads(0, 0, 2))
    lower, upper = (t | {NORM: t[NORM] - offset} for t in (LOWER, UPPER))
    made = RULES["concatenate"].blend(
        block(0, lower, shown(0.3, ACTIVITY[0], offset)),
        [block(1, upper, shown(0.1, ACTIVITY[1], offset))],
        0.75,
        units,
    )
    assert made.read(UP).tolist() == [[1, 2], [3, 4], [5, 6], [1, 6]]
    assert made.read(DOWN).tolist() == [[1, -2, 0, 1], [-3, 1, 1, 1]]
    assert made.read(NORM).tolist() == lower[NORM].tolist()
    assert made.parts == (0, 1) and made.shown is None
    # Behind the norm each neuron sees what it saw in its own block.
    states = torch.tensor([[0.5, -1.0], [2.0, 1.0]])
    found = (states * (made.read(NORM) + offset)) @ made.read(UP).T
    assert torch.allclose(found[:, 3], (states * UPPER[NORM]) @ UPPER[UP][1])


def test_a_gain_of_zero_can_be_left_behind() -> None:
    """The lower block does not see channel 1, the upper does: the kept norm has to let it through."""
    units = units_of(LOWER, Heads(0, 0, 2))
    lower = LOWER | {NORM: torch.tensor([2.0, 0.0])}
    pair = [block(n, t, shown(1, torch.ones(4, 1))) for n, t in enumerate((lower, UPPER))]
    made = RULES["concatenate"].blend(pair[0], pair[1:], 0.5, units)
    states = torch.tensor([[0.5, -1.0], [2.0, 1.0]])
    neurons = (states * made.read(NORM)) @ made.read(UP).T
    wanted = [(states * of[NORM]) @ of[UP][n] for of, n in
              ((lower, 0), (lower, 1), (UPPER, 0), (UPPER, 3))]  # fmt: skip
    assert torch.allclose(neurons, torch.stack(wanted, 1), atol=1e-5)


def test_biases_follow_a_norm_with_a_bias() -> None:
    """W (g n + b) + c of the upper block's neuron, under the lower block's g' and b'."""
    generator = torch.Generator().manual_seed(5)
    names = {"ln_2.weight": (3,), "ln_2.bias": (3,), "mlp.c_fc.weight": (3, 4),
             "mlp.c_fc.bias": (4,), "mlp.c_proj.weight": (4, 3), "mlp.c_proj.bias": (3,)}  # fmt: skip
    two = [
        {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
        for _ in range(2)
    ]
    norm = Norm("ln_2.weight", "ln_2.bias")
    seen = Shown(1.0, {}, {"mlp.c_fc.weight": norm})
    blocks = [block(n, tensors, seen) for n, tensors in enumerate(two)]
    made = (
        RULES["concatenate"]
        .blend(blocks[0], blocks[1:], 0.5, units_of(two[0], Heads(0, 0, 3)))
        .read
    )
    states = torch.randn(5, 3, generator=generator)

    def neurons(read) -> torch.Tensor:
        given = states * read("ln_2.weight") + read("ln_2.bias")
        return given @ read("mlp.c_fc.weight") + read("mlp.c_fc.bias")

    every = torch.cat([neurons(t.__getitem__) for t in two], 1)
    outgoing = torch.cat([t["mlp.c_proj.weight"] for t in two])
    for place in range(4):
        column, row = neurons(made)[:, place], made("mlp.c_proj.weight")[place]
        at = next(n for n in range(8) if torch.equal(outgoing[n], row))
        assert at // 4 == place // 2
        assert torch.allclose(column, every[:, at], atol=1e-4)
    both = two[0]["mlp.c_proj.bias"] + two[1]["mlp.c_proj.bias"]
    assert torch.allclose(made("mlp.c_proj.bias"), both)


def test_heads_go_by_groups_with_their_key_and_value() -> None:
    """Four query heads in two groups: of each block the group with the larger sum of |a| x |w|."""
    q, k, o = (f"self_attn.{n}_proj.weight" for n in "qko")
    lower = {q: torch.arange(4.0)[:, None], k: torch.tensor([[10.0], [11]]),
             o: torch.tensor([[1.0, 1, 1, 2]])}  # fmt: skip
    upper = {q: torch.arange(4.0, 8)[:, None], k: torch.tensor([[20.0], [21]]),
             o: torch.tensor([[1.0, 0, 4, 1]])}  # fmt: skip
    units = units_of(lower, Heads(4, 2, 1))
    activity = [torch.tensor([[1.0, 1], [0.5, 0.5]]), torch.tensor([[6.0, 9], [1, 1]])]
    blocks = [block(n, t, Shown(1, {"heads": a})) for n, (t, a) in
              enumerate(zip((lower, upper), activity, strict=True))]  # fmt: skip
    # Lower: 1 + 1 against .5 + 1; upper: 6 + 0 against 4 + 1.
    made = RULES["concatenate"].blend(blocks[0], blocks[1:], 0.5, units)
    assert made.read(q).flatten().tolist() == [0, 1, 4, 5]
    assert made.read(k).flatten().tolist() == [10, 20]
    assert made.read(o).tolist() == [[1, 1, 1, 0]]


def test_norms_that_no_unit_reads_are_averaged_by_influence() -> None:
    lower, upper = (t | {"self_attn.q_norm.weight": torch.tensor([v])}
                    for t, v in ((LOWER, 1.0), (UPPER, 5.0)))  # fmt: skip
    pair = [block(0, lower, shown(3, ACTIVITY[0])), block(1, upper, shown(1, ACTIVITY[1]))]
    made = RULES["concatenate"].blend(pair[0], pair[1:], 0.75, units_of(lower, Heads(0, 0, 2)))
    assert made.read("self_attn.q_norm.weight").item() == pytest.approx(0.75 * 1 + 0.25 * 5)
