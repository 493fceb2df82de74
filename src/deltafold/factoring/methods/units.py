"""What is factored together, what it costs, and ranks for a number of parameters.

    unit of one matrix      W (o x i)                       r (o + i) instead of o i
    unit of n blocks        W_1 .. W_n with one A (r x i)   r (o_1 + .. + o_n + i) instead of n o i

Half of the rank of a square matrix saves nothing: the share of a rank and the share of parameters
are two things, and all shares here are of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Ranks = list[int | None]
"""A rank for each unit; None leaves it dense."""

_HALVINGS = 60


@dataclass(frozen=True)
class Unit:
    """Matrices (o_j x i) that share their inner factor A, by the names of their modules.

    `rows` are the o_j, `columns` is i. `anchors` is how many matrices (o x i) are stored beside the
    factors: 1 for the mean of experts. `added` is what else factors bring along: new biases.
    """

    name: str
    role: str
    blocks: tuple[int, ...]
    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    added: int = 0
    anchors: int = 0
    owns_a: bool = False

    @property
    def dense(self) -> int:
        """Parameters without factors."""
        return sum(self.rows) * self.columns

    @property
    def per_rank(self) -> int:
        """Parameters of one more rank."""
        return sum(self.rows) + self.columns * (len(self.rows) if self.owns_a else 1)

    @property
    def fixed(self) -> int:
        """Parameters that factors of any rank bring along."""
        return self.added + self.anchors * self.rows[0] * self.columns

    @property
    def full(self) -> int:
        """The rank at which the factors are exact."""
        return min(min(self.rows) if self.owns_a else sum(self.rows), self.columns)

    @property
    def most(self) -> int:
        """The largest rank that saves parameters, 0 if there is none."""
        return max(0, min(self.full, (self.dense - self.fixed - 1) // self.per_rank))

    def parameters(self, rank: int | None) -> int:
        """What is stored at a rank."""
        return self.dense if rank is None else self.fixed + rank * self.per_rank

    def rank_at(self, share: float) -> int | None:
        """floor of what `share` of the parameters pays for; at least 1, and None if dense is less."""
        if not self.most or share >= 1:
            return None
        rank = max(1, int((share * self.dense - self.fixed) // self.per_rank))
        return None if rank > self.most else rank


def total(units: Sequence[Unit], ranks: Sequence[int | None]) -> int:
    """Parameters of all units at these ranks."""
    return sum(unit.parameters(rank) for unit, rank in zip(units, ranks, strict=True))


def smallest(units: Sequence[Unit]) -> int:
    """The fewest parameters that the units can have: rank 1 wherever that saves."""
    return sum(unit.parameters(1 if unit.most else None) for unit in units)


def rank_share(units: Sequence[Unit], ranks: Sequence[int | None]) -> float:
    """Ranks kept / full ranks, over all units; dense ones count as full."""
    full = sum(unit.full for unit in units)
    pairs = zip(units, ranks, strict=True)
    return sum(unit.full if rank is None else rank for unit, rank in pairs) / max(1, full)


def ranks_for(units: Sequence[Unit], parameters: int, weights: Sequence[float] = ()) -> Ranks:
    """Ranks with at most `parameters` in all, each unit's share of its own parameters c w.

    The weights w are 1 where none are given: all units keep the same share. c is found by bisection;
    what floors leave over goes to the units that came nearest to their next rank. Raises ValueError
    if not even rank 1 fits.
    """
    if smallest(units) > parameters:
        raise ValueError(f"{parameters} parameters are fewer than the smallest: {smallest(units)}")
    weights = weights or [1.0] * len(units)
    low, high = 0.0, 1.0 / max(1e-9, min(weights, default=1.0))
    ranks = _at(units, weights, low)
    if total(units, full := _at(units, weights, high)) <= parameters:
        return full
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = _at(units, weights, middle)
        if total(units, tried) <= parameters:
            low, ranks = middle, tried
        else:
            high = middle
    return _topped_up(units, ranks, parameters, [low * w for w in weights])


def _at(units: Sequence[Unit], weights: Sequence[float], scale: float) -> Ranks:
    return [unit.rank_at(scale * weight) for unit, weight in zip(units, weights, strict=True)]


def _topped_up(
    units: Sequence[Unit], ranks: Ranks, parameters: int, shares: Sequence[float]
) -> Ranks:
    """One more rank for units that came near to it, as long as there are parameters for it."""
    left = parameters - total(units, ranks)
    lacking = []
    for place, (unit, rank, share) in enumerate(zip(units, ranks, shares, strict=True)):
        if rank is not None and rank < unit.most:
            exact = (share * unit.dense - unit.fixed) / unit.per_rank
            lacking.append((rank - exact, place))
    made = list(ranks)
    for _, place in sorted(lacking):
        if units[place].per_rank <= left:
            made[place] = (made[place] or 0) + 1
            left -= units[place].per_rank
    return made
