"""Which blocks share, which they refer to, and at what rank: exact counts before any work.

    alternating   . . A d A d A d . .        A anchor, d delta, . as it is
    sequential    . . . A d d d d . .
    searched      deltas where they cost least, each with the nearest block before it that is none

The deepest blocks come first. The first two and the last two are protected: never deltas. Parameters
are those of the base, less the weights of shared layers, plus r (out + in) for each matrix.

The controls store as many parameters as the DeltaLLM of the same request:

    no-anchor   the same blocks and ranks, factors alone
    drop-mlp    nothing in place of the MLP, in so many blocks that the rest makes one low-rank MLP
    tie         the anchor's MLP as it is, the rest likewise
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltafold.blocks.structure import Layer, Structure
from deltafold.composed.form import Form, Linear, Part
from deltafold.errors import BudgetError, MismatchError, UsageError
from deltafold.sharing.request import DELTA, MATRICES, ShareRequest

WIDTH_A_RANK = 3
"""With a share of parameters alone, so many blocks share that a rank of width / 3 is left to each.

Of SmolLM2-135M at 88 % of its parameters, before training: KL 0.66 with 13 MLPs of rank 222, 0.94 with
7 of rank 54 (factors without anchors).
"""


@dataclass(frozen=True)
class Place:
    """One block that shares. `anchor` None: nothing to refer to. Ranks 0: nothing added."""

    block: int
    anchor: int | None
    read_rank: int
    write_rank: int


@dataclass(frozen=True)
class Plan:
    """Where what is shared, and what that comes to."""

    structure: Structure
    request: ShareRequest
    places: tuple[Place, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return MATRICES[self.request.matrices]

    @property
    def scaled(self) -> bool:
        """Whether anchors' rows are scaled: those of the controls are not."""
        return self.request.scales_rows and self.request.method == DELTA

    @property
    def shared_parameters(self) -> int:
        """Weights that are not stored any more."""
        return sum(
            layer.weights
            for place in self.places
            for layer in self.structure.of(place.block, self.parts)
        )

    @property
    def delta_parameters(self) -> int:
        """Numbers in factors and scales."""
        return sum(
            layer.factor_cost(place.write_rank if layer.writes else place.read_rank)
            + self.scaled * layer.shape[0]
            for place in self.places
            for layer in self.structure.of(place.block, self.parts)
        )

    @property
    def parameters(self) -> int:
        """All that are stored."""
        return self.structure.parameters - self.shared_parameters + self.delta_parameters

    @property
    def groups(self) -> dict[str, list[str]]:
        """Modules that are replaced as one, the deepest first: their names, their layers' names."""
        made = {}
        for place in sorted(self.places, key=lambda place: -place.block):
            for part in self.parts:
                layers = self.structure.of(place.block, (part,))
                made[f"block {place.block} {part}"] = [
                    self.structure.path(place.block, layer.local) for layer in layers
                ]
        return made

    def form(self) -> Form:
        """The form of the model to be written."""
        linears = {}
        for place in self.places:
            for layer in self.structure.of(place.block, self.parts):
                rank = place.write_rank if layer.writes else place.read_rank
                ranks = [layer.rank_of(rows, rank) for rows in layer.rows]
                parts = (
                    tuple(Part(rows=r, rank=k) for r, k in zip(layer.rows, ranks, strict=True))
                    if rank
                    else ()
                )
                anchor = (
                    None if place.anchor is None else self.structure.path(place.anchor, layer.local)
                )
                linears[self.structure.path(place.block, layer.local)] = Linear(
                    shape=layer.shape,
                    weight=anchor,
                    scale=self.scaled,
                    bias=layer.bias,
                    transposed=layer.transposed,
                    parts=parts,
                )
        return Form(method=self.to_json()["method"], linears=linears)

    def to_json(self) -> dict[str, Any]:
        """For records: what was asked for, where what is shared, exact counts."""
        base = self.structure.parameters
        return {
            "method": {
                "name": self.request.method,
                "placement": self.request.placement,
                "matrices": self.request.matrices,
                "split": self.request.split,
                "scale": self.scaled,
            },
            "blocks": self.structure.depth,
            "places": [
                {
                    "block": place.block,
                    "anchor": place.anchor,
                    "rank": place.read_rank,
                    "write_rank": place.write_rank,
                }
                for place in self.places
            ],
            "base_parameters": base,
            "parameters": self.parameters,
            "parameter_share": self.parameters / base,
            "shared_parameters": self.shared_parameters,
            "delta_parameters": self.delta_parameters,
        }


def make_plan(
    structure: Structure, request: ShareRequest, costs: Mapping[int, float] | None = None
) -> Plan:
    """The plan of a request. `costs` of each block are needed by the placement `searched`.

    Raises UsageError, BudgetError, MismatchError, each with what would be possible.
    """
    pairs = _pairs(structure, request, costs)
    parts = MATRICES[request.matrices]
    for block, anchor in pairs:
        here, there = (
            [(x.local, x.shape) for x in structure.of(n, parts)] for n in (block, anchor)
        )
        if here != there:
            raise MismatchError(
                f"Blocks {anchor} and {block} of {structure.label} have layers of different shapes, "
                "so one cannot refer to the other; protect one of them."
            )
    if not pairs:
        raise BudgetError(
            f"{structure.label} has {structure.depth} blocks, of which no two can share; protect fewer "
            "(--protect 0,-1)."
        )
    count, rank = _count_and_rank(structure, request, pairs)
    reads, writes = _split(structure, request, pairs[0][0], rank)
    chosen = sorted(pairs[:count])
    places = tuple(Place(block, anchor, reads, writes) for block, anchor in chosen)
    plan = Plan(structure, request, places)
    return plan if request.method == DELTA else _control(plan)


def _control(plan: Plan) -> Plan:
    """The control that stores as many parameters."""
    method = plan.request.method
    if method == "no-anchor":
        return replace(plan, places=tuple(replace(place, anchor=None) for place in plan.places))
    bare = [
        replace(place, read_rank=0, write_rank=0, anchor=place.anchor if method == "tie" else None)
        for place in sorted(plan.places, key=lambda place: -place.block)
    ]
    each = sum(layer.weights for layer in plan.structure.of(bare[0].block, plan.parts))
    main = replace(plan, request=plan.request.but(method=DELTA))
    gone = plan.structure.parameters - main.parameters
    count = math.ceil(gone / each)
    left = count * each - gone
    rank = _rank_for(plan.structure.of(bare[count - 1].block, plan.parts), left)
    places = [*bare[: count - 1], replace(bare[count - 1], read_rank=rank, write_rank=rank)]
    return replace(plan, places=tuple(sorted(places, key=lambda place: place.block)))


def _pairs(
    structure: Structure, request: ShareRequest, costs: Mapping[int, float] | None
) -> list[tuple[int, int]]:
    """(delta, anchor) in the order in which they are taken: the deepest, or the cheapest, first."""
    depth = structure.depth
    for number in request.protect:
        if not -depth <= number < depth:
            raise UsageError(
                f"{structure.label} has blocks 0 to {depth - 1}, so block {number} cannot be protected."
            )
    kept = {number % depth for number in request.protect}
    free = [number for number in range(depth) if number not in kept]
    if request.placement == "alternating":
        return [(free[n + 1], free[n]) for n in range(0, len(free) - 1, 2)][::-1]
    if request.placement == "sequential":
        most = len(free) - 1
        count = most if request.shared is None else min(request.shared, most)
        if request.shared is None:
            count = _sequential_count(structure, request, free)
        return [(block, free[-count - 1]) for block in free[-count:][::-1]] if count > 0 else []
    if costs is None:
        raise UsageError(
            "The placement searched measures what each block costs, and needs weights and text for "
            "that: use share; plan knows the placements alternating and sequential."
        )
    order = sorted((n for n in free if n in costs), key=lambda n: (costs[n], -n))
    if request.shared is not None:
        return _before(order[: request.shared])
    return _before(order[: _count_and_rank(structure, request, _before(order))[0]]) if order else []


def _before(deltas: Sequence[int]) -> list[tuple[int, int]]:
    """(delta, the nearest block before it that is none), in the order given."""
    return [(block, max(set(range(block)) - set(deltas))) for block in deltas]


def _sequential_count(structure: Structure, request: ShareRequest, free: Sequence[int]) -> int:
    """How many follow one anchor: it stands before them, so their number must be known first."""
    pairs = [(block, free[0]) for block in free[1:]][::-1]
    return _count_and_rank(structure, request, pairs)[0] if pairs else 0


def _count_and_rank(
    structure: Structure, request: ShareRequest, pairs: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Blocks that share, and the rank of each: as asked, or what the share of parameters affords."""
    layers = structure.of(pairs[0][0], MATRICES[request.matrices])
    _check_asked(structure, request, layers, len(pairs))
    if request.parameters is None:
        assert request.shared is not None and request.rank is not None
        return request.shared, request.rank
    counts = range(1, len(pairs) + 1) if request.shared is None else [request.shared]
    affordable = _affordable_ranks(structure, request, layers, counts)
    found = (
        _at_a_good_rank(affordable, max(1, round(structure.width / WIDTH_A_RANK)))
        if request.rank is None
        else _at_rank(affordable, request.rank)
    )
    if found is None:
        raise _too_small(structure, request, layers, counts[-1])
    return found


def _at_rank(affordable: Mapping[int, int], rank: int) -> tuple[int, int] | None:
    """The fewest blocks that afford this rank; None: no number of them does."""
    return next(((count, rank) for count, most in affordable.items() if most >= rank), None)


def _at_a_good_rank(affordable: Mapping[int, int], good: int) -> tuple[int, int] | None:
    """The fewest blocks that afford a good rank, else the most that afford any; None: none do."""
    fitting = [(count, rank) for count, rank in affordable.items() if rank >= 1]
    return next((each for each in fitting if each[1] >= good), fitting[-1] if fitting else None)


def _check_asked(
    structure: Structure, request: ShareRequest, layers: Sequence[Layer], most: int
) -> None:
    """Raises BudgetError or UsageError for more blocks, or a larger rank, than there can be."""
    if request.shared is not None and request.shared > most:
        raise BudgetError(
            f"{structure.label} has {structure.depth} blocks, of which at most {most} can refer to "
            f"another ({request.placement}, {len(request.protect)} protected), not {request.shared}; "
            "ask for fewer, or protect fewer."
        )
    if request.rank is not None and request.rank > _largest_rank(layers):
        raise UsageError(
            f"rank {request.rank} is more than these matrices have ({_largest_rank(layers)})."
        )


def _affordable_ranks(
    structure: Structure, request: ShareRequest, layers: Sequence[Layer], counts: Sequence[int]
) -> dict[int, int]:
    """For each count of blocks the greatest rank that keeps the share of parameters; 0: none does."""
    assert request.parameters is not None
    target = math.floor(request.parameters * structure.parameters)
    each = _saved(request, layers)
    return {
        count: _rank_for(layers, (target - structure.parameters + count * each) // count)
        for count in counts
    }


def _too_small(
    structure: Structure, request: ShareRequest, layers: Sequence[Layer], count: int
) -> BudgetError:
    rank = request.rank or 1
    cost = sum(layer.factor_cost(rank) for layer in layers)
    least = structure.parameters - count * (_saved(request, layers) - cost)
    return BudgetError(
        f"{count} blocks that share leave {least / structure.parameters:.1%} of the parameters of "
        f"{structure.label} at rank {rank}, not {request.parameters:.1%}; ask for a larger "
        "share, protect fewer blocks, or share --matrices both."
    )


def _saved(request: ShareRequest, layers: Sequence[Layer]) -> int:
    """Parameters that one block is rid of, before factors: its weights, less scales."""
    return sum(layer.weights - request.scales_rows * layer.shape[0] for layer in layers)


def _largest_rank(layers: Sequence[Layer]) -> int:
    return max(min(*layer.shape) for layer in layers)


def _rank_for(layers: Sequence[Layer], numbers: int) -> int:
    """The greatest rank whose factors in one block are no more than so many numbers."""
    rank = max(0, numbers) // sum(layer.factor_cost(1) for layer in layers)
    return min(rank, _largest_rank(layers))


def _split(structure: Structure, request: ShareRequest, block: int, rank: int) -> tuple[int, int]:
    """(rank of what reads, of what writes) that cost together no more than `rank` for both."""
    if request.split == 1:
        return rank, rank
    layers = structure.of(block, MATRICES[request.matrices])
    reads = sum(layer.factor_cost(1) for layer in layers if not layer.writes)
    writes = sum(layer.factor_cost(1) for layer in layers if layer.writes)
    read_rank = max(1, math.floor(rank * (reads + writes) / (reads + request.split * writes)))
    left = rank * (reads + writes) - read_rank * reads
    return read_rank, max(1, left // max(1, writes))
