"""How many components of each tensor's delta an adapter keeps."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltafold.errors import BudgetError, UsageError

DEFAULT_RANK = 64


@dataclass(frozen=True)
class Choice:
    """What was asked for: at most one of a rank, a share of energy, a number of bytes.

    Nothing asked: factors that an archive stores stay as they are, other deltas get rank 64.
    """

    rank: int | None = None
    energy: float | None = None
    n_bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.rank, self.energy, self.n_bytes)) > 1:
            raise UsageError("Give one of --rank, --energy and --bytes.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank must be at least 1, not {self.rank}.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy must lie above 0 and be at most 1, not {self.energy:g}.")

    @property
    def takes_stored(self) -> bool:
        """True if stored factors are to be taken as they are, whatever their number."""
        return self == Choice()

    def components(self, shape: tuple[int, int], cost_bytes: int, limit: int | None) -> int:
        """How many components of an o x i delta to compute; one costs `cost_bytes`."""
        most = min(*shape, limit or max(shape))
        if self.n_bytes is not None:
            return max(1, min(most, self.n_bytes // cost_bytes))
        return min(most, self.rank or DEFAULT_RANK) if self.energy is None else most


def energy_rank(s: Sequence[float], total_squared: float, energy: float) -> int:
    """The fewest leading components whose squares reach `energy` of the total.

    >>> energy_rank([3.0, 2.0, 1.0], 14.0, 0.9)
    2
    """
    reached = 0.0
    for rank, value in enumerate(s, start=1):
        reached += value**2
        if reached >= energy * total_squared * (1 - 1e-6):
            return rank
    return len(s)


def bytes_ranks(
    spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int], n_bytes: int
) -> dict[str, int]:
    """Ranks that keep the most energy in `n_bytes`: the dearest components a byte first.

    `costs` are the bytes of one component of each tensor. Raises BudgetError if not one fits.

    >>> bytes_ranks({"x": [4.0, 1.0], "y": [3.0, 2.0]}, {"x": 10, "y": 10}, 30)
    {'x': 1, 'y': 2}
    """
    ranks = dict.fromkeys(spectra, 0)
    queue = [(-(s[0] ** 2) / costs[name], name) for name, s in spectra.items() if len(s)]
    heapq.heapify(queue)
    left = n_bytes
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > left:
            continue
        left -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(spectra[name]):
            value = spectra[name][ranks[name]]
            heapq.heappush(queue, (-(value**2) / costs[name], name))
    if spectra and not any(ranks.values()):
        raise BudgetError(
            f"--bytes leaves {n_bytes:,} bytes for pairs, less than one component; give at least "
            f"{min(costs.values()) - n_bytes:,} bytes more."
        )
    return ranks
