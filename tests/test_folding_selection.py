"""Which blocks go, on evidence made up by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from deltafold.coding.counter import derive_key
from deltafold.folding.methods.selection import SELECTIONS, Step, runs


@dataclass
class Known:
    """Evidence from a table."""

    n: int
    protected: set[int] = field(default_factory=set)
    key: int = 7
    matrix: torch.Tensor | None = None
    costs: dict[int, float] = field(default_factory=dict)
    near: dict[tuple[int, ...], float] = field(default_factory=dict)
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def alike(self) -> torch.Tensor:
        return self.matrix if self.matrix is not None else torch.zeros(self.n + 1, self.n + 1)

    def absence(self, positions: Sequence[int]) -> float:
        self.asked.append(tuple(positions))
        near = sum(abs(a - b) == 1 for a in positions for b in positions) / 2
        return sum(self.costs[position] for position in positions) + 10 * near

    def parts(self) -> dict:
        return {(i, p): self.costs[10 * i + (p == "mlp")] for i in range(self.n)
                for p in ("attention", "mlp")}  # fmt: skip

    def closeness(self, steps: Sequence[Step]) -> float:
        gone = tuple(place for step in steps for place in step.gone)
        self.asked.append(gone)
        return self.near[gone]


def choose(name: str, known: Known, count: int) -> list[Step]:
    return SELECTIONS[name].choose(known, count)


def matrix(n: int, **values: float) -> torch.Tensor:
    out = torch.zeros(n + 1, n + 1)
    for key, value in values.items():
        i, j = map(int, key[1:].split("_"))
        out[i, j] = out[j, i] = value
    return out


def test_adjacent_pairs_compares_outputs_not_inputs() -> None:
    """Block i's output is state i + 1: A[2, 3] speaks of blocks 1 and 2."""
    known = Known(4, matrix=matrix(4, a0_1=0.99, a2_3=0.9, a3_4=0.5))
    assert choose("adjacent-pairs", known, 3) == [Step(1, (2,), pytest.approx(0.9))]
    known.protected = {2}
    assert choose("adjacent-pairs", known, 3) == [Step(0, (1,), pytest.approx(0.0))]
    known.protected = {1, 3}
    assert choose("adjacent-pairs", known, 1) == []


def test_the_last_two_each_time() -> None:
    assert choose("last-pair", Known(5), 2) == [Step(3, (4,))]
    assert choose("last-pair", Known(5, {4}), 2) == [Step(2, (3,))]


def test_last() -> None:
    assert choose("last", Known(6), 2) == [Step(3, (4, 5))]
    assert choose("last", Known(6, {4}), 2) == [Step(4, (5,)), Step(2, (3,))]


def test_a_contiguous_cut_has_its_states_around_it() -> None:
    """Removing blocks 1 and 2 of 4 joins state 1 to state 3: A[1, 3], not A[2, 4].

    Nothing is skipped: state 0, what enters block 0, is looked at too.
    """
    known = Known(4, matrix=matrix(4, a1_3=0.8, a2_4=0.7, a0_2=0.6))
    assert choose("contiguous", known, 2) == [Step(0, (1, 2), pytest.approx(0.8))]
    known.matrix = matrix(4, a0_2=0.9, a1_3=0.8)
    assert choose("contiguous", known, 2) == [Step(None, (0, 1), pytest.approx(0.9))]
    known.protected = {0}
    assert choose("contiguous", known, 2)[0].gone == (1, 2)
    known.protected = {0, 2}
    assert choose("contiguous", known, 2) == []


def test_lowest_takes_the_least_influence_at_once() -> None:
    known = Known(5, matrix=matrix(5, a0_1=0.1, a1_2=0.9, a2_3=0.2, a3_4=0.8, a4_5=0.7))
    found = choose("lowest", known, 3)
    assert [(step.keep, step.gone) for step in found] == [(2, (3, 4)), (0, (1,))]
    assert found[0].score == pytest.approx(0.75)


def test_greedy_takes_the_cheapest_absence() -> None:
    known = Known(3, costs={0: 5.0, 1: 2.0, 2: 3.0})
    assert choose("greedy", known, 2) == [Step(0, (1,), -2.0)]
    known.protected = {1}
    assert choose("greedy", known, 2) == [Step(1, (2,), -3.0)]


def test_lazy_asks_again_only_for_what_looks_cheapest() -> None:
    """Neighbours that go together cost 10 more: after 2 its neighbour 3 is asked, and passed over."""
    known = Known(6, costs={0: 5.0, 1: 6.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 9.0})
    found = choose("lazy", known, 2)
    assert [step.gone for step in found] == [(4,), (2,)]
    assert known.asked == [(i,) for i in range(6)] + [(2, 3), (2, 4)]
    known = Known(3, costs={0: 3.0, 1: 1.0, 2: 30.0})
    assert choose("lazy", known, 1) == [Step(0, (1,))]


def test_random_follows_the_seed() -> None:
    drawn = {
        seed: sorted(
            i for s in choose("random", Known(30, {3}, derive_key(seed, "fold")), 6) for i in s.gone
        )
        for seed in range(6)
    }
    assert all(len(each) == 6 and 3 not in each for each in drawn.values())
    assert len({tuple(each) for each in drawn.values()}) == 6
    again = choose("random", Known(30, {3}, derive_key(0, "fold")), 6)
    assert sorted(i for s in again for i in s.gone) == drawn[0]


def test_joint_ranks_attention_and_mlp_together() -> None:
    known = Known(2, costs={0: 0.9, 1: 0.2, 10: 0.3, 11: 0.8})
    found = choose("joint", known, 1)
    assert found == [Step(None, (0,), 0.9, "attention"), Step(None, (1,), 0.8, "mlp")]


def test_the_weakest_pair_is_what_both_together_change_least() -> None:
    """Blocks 1 and 2 of 4 stand between states 1 and 3; their outputs are states 2 and 3."""
    known = Known(4, matrix=matrix(4, a1_3=0.9, a2_4=0.8, a2_3=0.1, a3_4=0.99))
    assert choose("weakest-pair", known, 3) == [Step(1, (2,), pytest.approx(0.9))]
    known.protected = {1}
    assert choose("weakest-pair", known, 1) == [Step(2, (3,), pytest.approx(0.8))]
    known.protected = {0, 2}
    assert choose("weakest-pair", known, 1) == []


def test_top_down_sweeps_once_with_one_threshold() -> None:
    """Groups of four from the last on; after one was folded the next begins two below it."""
    near = {(7, 8, 9): 0.5, (6, 7, 8): 0.8, (6, 7, 8, 5, 6): 0.0}
    near |= {(6, 7, 8, 4, 5): 0.72, (6, 7, 8, 3, 4): 0.76}
    known = Known(10, near=near)
    # Block 5 takes in 6 to 8; then the group begins at 3 and ends in 4, as two are left to take.
    assert choose("top-down", known, 5) == [
        Step(5, (6, 7, 8), 0.8, threshold=0.75), Step(2, (3, 4), 0.76, threshold=0.75)
    ]  # fmt: skip
    assert known.asked == [(7, 8, 9), (6, 7, 8), (6, 7, 8, 4, 5), (6, 7, 8, 3, 4)]


def test_top_down_takes_the_highest_threshold_that_goes_far_enough() -> None:
    """At 0.75 only one group is folded; at 0.65 the first group is taken as well, and it is enough."""
    near = {(4, 5): 0.7, (3, 4): 0.6, (2, 3): 0.55, (1, 2): 0.3}
    known = Known(6, near=near)
    assert choose("top-down", known, 2) == [Step(3, (4, 5), 0.7, threshold=0.65)]
    assert len(known.asked) == len(set(known.asked)), "nothing is measured twice"
    known = Known(6, {5}, near={(3, 4): -0.2, (2, 3): -0.3, (1, 2): -0.4})
    assert choose("top-down", known, 2) == [Step(2, (3, 4), -0.2, threshold=-0.25)]
    # A single block.
    assert choose("top-down", Known(6, near={(5,): 0.99}), 1) == [
        Step(4, (5,), 0.99, threshold=0.75)
    ]


def test_runs() -> None:
    assert runs([]) == []
    assert [step.gone for step in runs([0, 1, 4, 6, 7])] == [(6, 7), (4,), (0, 1)]
    assert runs([0])[0].keep is None


def test_a_stretch_is_the_cheapest_run() -> None:
    """Runs of two cost 10 more than their blocks: 1 + 2, 2 + 3, 3 + 0, 0 + 5. Of equals the later."""
    costs = dict(enumerate((1.0, 2.0, 3.0, 0.0, 5.0)))
    stretch = SELECTIONS["stretch"].choose
    assert stretch(Known(5, costs=costs), 2) == [Step(1, (2, 3), -13.0)]
    assert stretch(Known(5, {2}, costs=costs), 2) == [Step(None, (0, 1), -13.0)]
    assert stretch(Known(5, {1, 3}, costs=costs), 2) == []
