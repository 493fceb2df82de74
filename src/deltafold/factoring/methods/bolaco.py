"""Bolaco (arXiv 2405.10616): five parameter shares, searched while the total stays the same.

    query and key | attention output | gate | up | down          values stay dense

A trial says how the parameters are split between the groups; all matrices of a group keep the same
share. Shares are scaled together until the total is what was asked for, so trials differ only in the
split. Factors are computed once, at full reach, and cut for each trial: their columns are nested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deltafold.factoring.methods.units import Ranks, Unit, ranks_for, smallest, total

GROUPS = ("qk", "o", "gate", "up", "down")
_GROUP_OF = {"q": "qk", "k": "qk", "qkv": "qk", "gate_up": "gate"}
DENSE = "v"
LOWEST, HIGHEST = 0.2, 1.0
"""Bounds of the weights that a trial draws, before they are scaled."""
KL_WEIGHT = 1e-3


def group_of(role: str) -> str:
    """The group of a matrix by its role; fused projections go by their first."""
    return _GROUP_OF.get(role, role)


def groups_of(units: Sequence[Unit]) -> list[str]:
    """The groups that a model has, in the paper's order, then others."""
    found = {group_of(unit.role) for unit in units} - {DENSE}
    return [each for each in GROUPS if each in found] + sorted(found - set(GROUPS))


def split_ranks(units: Sequence[Unit], weights: Mapping[str, float], parameters: int) -> Ranks:
    """Ranks with at most `parameters` in all for a split; raises ValueError if none fits."""
    free = [unit for unit in units if unit.role != DENSE]
    left = parameters - sum(unit.dense for unit in units if unit.role == DENSE)
    found = iter(ranks_for(free, left, [weights[group_of(unit.role)] for unit in free]))
    return [None if unit.role == DENSE else next(found) for unit in units]


def fewest(units: Sequence[Unit]) -> int:
    """The fewest parameters that a split can have."""
    return sum(unit.dense for unit in units if unit.role == DENSE) + smallest(
        [unit for unit in units if unit.role != DENSE]
    )


def shares_of(units: Sequence[Unit], ranks: Sequence[int | None]) -> dict[str, float]:
    """Parameters kept / parameters of each group: what the paper's five numbers are."""
    found = {}
    for group in groups_of(units):
        pairs = [(u, r) for u, r in zip(units, ranks, strict=True) if group_of(u.role) == group]
        chosen, kept = [u for u, _ in pairs], [r for _, r in pairs]
        found[group] = total(chosen, kept) / sum(unit.dense for unit in chosen)
    return found


def objective(perplexity: float, kl: float) -> float:
    """What a trial is judged by."""
    return perplexity + KL_WEIGHT * kl
