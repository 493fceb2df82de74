"""Which blocks go: one function a row of `SELECTIONS`.

A selection looks at what is known of the draft (`Evidence`) and answers with steps; a rule then
carries them out. Positions count the blocks that the draft has now, from 0. A selection may answer
with fewer blocks than asked for: it is then asked again, with evidence of the model folded so far.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from deltafold.coding.counter import random_u64

Part = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Step:
    """Blocks at the positions `gone` go; the one at `keep` takes them in (None: nothing does).

    `score` is what chose them, higher for a better choice, and `threshold` what it had to exceed.
    With `part` only that sub-layer goes.
    """

    keep: int | None
    gone: tuple[int, ...]
    score: float | None = None
    part: Part | None = None
    threshold: float | None = None


class Evidence(Protocol):
    """What selections may ask of the draft as it stands: n blocks."""

    n: int
    protected: Collection[int]
    """Positions that are neither removed nor merged."""
    key: int
    """Of the run's random stream."""

    def alike(self) -> torch.Tensor:
        """The matrix A (n+1, n+1) of the similarity asked for."""

    def absence(self, positions: Collection[int]) -> float:
        """What leaving out blocks costs, lower for a better choice."""

    def parts(self) -> dict[tuple[int, Part], float]:
        """How little the attention and the MLP of each block do: cosines."""

    def closeness(self, steps: Sequence[Step]) -> float:
        """Cosine of the last hidden states to the model's, once the steps are carried out in order."""


Selection = Callable[[Evidence, int], list[Step]]


def adjacent_pairs(evidence: Evidence, count: int) -> list[Step]:
    """The two neighbours whose outputs are most alike: MKA (arXiv 2406.16330), section 3.3."""
    alike, free = evidence.alike(), _free(evidence)
    pairs = [(i, i + 1) for i in range(evidence.n - 1) if {i, i + 1} <= free]
    if not pairs:
        return []
    low, high = max(pairs, key=lambda pair: (float(alike[pair[0] + 1, pair[1] + 1]), pair))
    return [Step(low, (high,), float(alike[low + 1, high + 1]))]


def weakest_pair(evidence: Evidence, count: int) -> list[Step]:
    """The two neighbours that together change the states least: A[i, i + 2] greatest.

    What enters the lower against what leaves the upper: CoMe (arXiv 2510.15304), section 3.2.
    """
    alike, free = evidence.alike(), _free(evidence)
    pairs = [(i, i + 1) for i in range(evidence.n - 1) if {i, i + 1} <= free]
    if not pairs:
        return []
    low, high = max(pairs, key=lambda pair: (float(alike[pair[0], pair[1] + 1]), pair))
    return [Step(low, (high,), float(alike[low, high + 1]))]


def last_pair(evidence: Evidence, count: int) -> list[Step]:
    """The last two neighbours that are free, whatever they are: what MKA's program merges."""
    free = _free(evidence)
    pairs = [(i, i + 1) for i in range(evidence.n - 1) if {i, i + 1} <= free]
    return [Step(pairs[-1][0], (pairs[-1][1],))] if pairs else []


def last(evidence: Evidence, count: int) -> list[Step]:
    """The last blocks."""
    return runs(sorted(_free(evidence))[-count:])


def contiguous(evidence: Evidence, count: int) -> list[Step]:
    """The `count` blocks in a row that do least: A[l, l + count] greatest.

    Gromov et al. 2024 (arXiv 2403.17887), section 3.1; of equals the later one.
    """
    spans, alike = _stretches(evidence, count), evidence.alike()
    if not spans:
        return []
    best = max(spans, key=lambda span: (float(alike[span[0], span[-1] + 1]), span[0]))
    score = float(alike[best[0], best[-1] + 1])
    return [Step(best[0] - 1 if best[0] else None, best, score)]


def stretch(evidence: Evidence, count: int) -> list[Step]:
    """The `count` blocks in a row whose absence costs least; of equals the later one."""
    spans = _stretches(evidence, count)
    if not spans:
        return []
    costs = {span: evidence.absence(span) for span in spans}
    best = min(costs, key=lambda span: (costs[span], -span[0]))
    return [Step(best[0] - 1 if best[0] else None, best, -costs[best])]


def lowest(evidence: Evidence, count: int) -> list[Step]:
    """The blocks that do least, at once: block influence, ShortGPT (arXiv 2403.03853), section 3."""
    alike = evidence.alike()
    scores = {i: float(alike[i, i + 1]) for i in _free(evidence)}
    order = sorted(scores, key=lambda i: (-scores[i], -i))[:count]
    return runs(sorted(order), scores)


def greedy(evidence: Evidence, count: int) -> list[Step]:
    """The one block whose absence costs least: SLEB (arXiv 2402.09025), algorithm 1."""
    costs = {i: evidence.absence([i]) for i in sorted(_free(evidence))}
    if not costs:
        return []
    best = min(costs, key=lambda i: (costs[i], -i))
    return runs([best], {best: -costs[best]})


def lazy(evidence: Evidence, count: int) -> list[Step]:
    """`greedy` without asking for every block each time; for rules that only drop.

    What a block's absence costs grows, as a rule, with others gone. So the block that was cheapest
    when last asked is asked again; if it still is cheaper than what the others cost when they were
    asked, it goes. Minoux 1978, accelerated greedy.
    """
    costs = {i: evidence.absence([i]) for i in sorted(_free(evidence))}
    gone: list[int] = []
    spent = 0.0
    while costs and len(gone) < count:
        asked: set[int] = set() if gone else set(costs)
        while (best := min(costs, key=lambda i: (costs[i], -i))) not in asked:
            costs[best] = evidence.absence([*gone, best]) - spent
            asked.add(best)
        spent += costs.pop(best)
        gone.append(best)
    return runs(sorted(gone))


def at_random(evidence: Evidence, count: int) -> list[Step]:
    """Blocks drawn by the seed."""
    free = sorted(_free(evidence))
    numbers = random_u64(evidence.key, 0, evidence.n)
    return runs(sorted(sorted(free, key=lambda i: int(numbers[i]))[:count]))


def joint(evidence: Evidence, count: int) -> list[Step]:
    """Attention and MLP of all blocks in one ranking; 2 x `count` of them go.

    He et al. 2024, joint layer drop (arXiv 2406.15786), eq. 4: 1 - cos of a sub-layer's input and
    output, both with the residual stream.
    """
    free = _free(evidence)
    scores = {at: score for at, score in evidence.parts().items() if at[0] in free}
    order = sorted(scores, key=lambda at: (-scores[at], -at[0], at[1]))[: 2 * count]
    return [Step(None, (position,), scores[position, part], part) for position, part in order]


TOP_DOWN_WINDOW = 4
"""Blocks that become one at a time; LaCo's C lies between 3 and 7."""
TOP_DOWN_INTERVAL = 2
"""How far down the next group begins after one was folded: LaCo's I, 1 or 2."""
TOP_DOWN_THRESHOLDS = tuple(n / 100 for n in range(75, 40, -5))
"""Those that LaCo's authors set by hand, 0.75 to 0.45; then still lower ones."""
TOP_DOWN_LOWER = tuple(n / 100 for n in range(40, -105, -5))


def top_down(evidence: Evidence, count: int) -> list[Step]:
    """One sweep from the last blocks down: a group becomes one block if the last states stay close.

    LaCo (arXiv 2402.11187), algorithm 1. The authors set the threshold by hand; here it is the
    highest of theirs with which a sweep takes as many blocks as are asked for.
    """
    near: dict[tuple[Step, ...], float] = {}
    steps: list[Step] = []
    for threshold in (*TOP_DOWN_THRESHOLDS, *TOP_DOWN_LOWER):
        steps = _sweep(evidence, count, threshold, near)
        if sum(len(step.gone) for step in steps) == count:
            break
    return steps


def _sweep(
    evidence: Evidence, count: int, threshold: float, near: dict[tuple[Step, ...], float]
) -> list[Step]:
    """Steps of one sweep, their places those of the draft; `near` remembers what was tried."""
    left, free = list(range(evidence.n)), _free(evidence)
    taken: list[Step] = []
    low = len(left) - min(TOP_DOWN_WINDOW, count + 1)
    while low >= 0 and count:
        size = min(TOP_DOWN_WINDOW - 1, count, len(left) - low - 1)
        group = left[low : low + size + 1]
        low -= 1
        if size < 1 or not free.issuperset(group):
            continue
        step = Step(group[0], tuple(group[1:]))
        tried = (*taken, step)
        if tried not in near:
            near[tried] = evidence.closeness(tried)
        if near[tried] > threshold:
            taken.append(step)
            left, count = [place for place in left if place not in step.gone], count - size
            low = min(low + 1 - TOP_DOWN_INTERVAL, len(left) - TOP_DOWN_WINDOW)
    return [
        Step(step.keep, step.gone, near[tuple(taken[: n + 1])], threshold=threshold)
        for n, step in enumerate(taken)
    ]


def runs(gone: Sequence[int], scores: dict[int, float] | None = None) -> list[Step]:
    """Positions in ascending order as steps: neighbours together, the block before them kept.

    The score of a step is the mean of its blocks'. The last run comes first, so that positions
    stay true while steps are carried out in order.
    """
    found: list[list[int]] = []
    for position in gone:
        if found and found[-1][-1] == position - 1:
            found[-1].append(position)
        else:
            found.append([position])
    return [
        Step(
            run[0] - 1 if run[0] else None,
            tuple(run),
            sum(scores[i] for i in run) / len(run) if scores else None,
        )
        for run in reversed(found)
    ]


def _stretches(evidence: Evidence, count: int) -> list[tuple[int, ...]]:
    """All runs of `count` free positions."""
    free = _free(evidence)
    runs_ = (tuple(range(start, start + count)) for start in range(evidence.n - count + 1))
    return [run for run in runs_ if free.issuperset(run)]


def _free(evidence: Evidence) -> set[int]:
    return set(range(evidence.n)) - set(evidence.protected)


@dataclass(frozen=True)
class Chooser:
    """A row of the table; `needs` says what of the evidence it asks for, `removes` what may go.

    `any`: blocks anywhere. `stretch`: blocks in one row. `follower`: blocks that stand right after one
    that is free too, which takes them in. `part`: the attention or the MLP of a block.
    """

    choose: Selection
    needs: Literal["nothing", "matrix", "absence", "parts", "closeness"] = "matrix"
    removes: Literal["any", "stretch", "follower", "part"] = "any"


SELECTIONS: dict[str, Chooser] = {
    "adjacent-pairs": Chooser(adjacent_pairs, removes="follower"),
    "weakest-pair": Chooser(weakest_pair, removes="follower"),
    "last-pair": Chooser(last_pair, removes="follower"),
    "last": Chooser(last, needs="nothing"),
    "contiguous": Chooser(contiguous, removes="stretch"),
    "lowest": Chooser(lowest),
    "greedy": Chooser(greedy, needs="absence"),
    "lazy": Chooser(lazy, needs="absence"),
    "stretch": Chooser(stretch, needs="absence", removes="stretch"),
    "random": Chooser(at_random, needs="nothing"),
    "top-down": Chooser(top_down, needs="closeness", removes="follower"),
    "joint": Chooser(joint, needs="parts", removes="part"),
}
