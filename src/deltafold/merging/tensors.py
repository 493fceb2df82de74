"""One tensor of a merge: read from base and models, measured, combined.

base rows --------------------------------> ground --------------------+
model rows, put where their tokens go --> delta --> sparsified --> merged --> * scale --> sum
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltafold.checkpoint import DTYPES
from deltafold.coding.counter import derive_key
from deltafold.coding.sums import all_finite, rounded_sum
from deltafold.errors import NonFiniteError
from deltafold.merging.inputs import Inputs
from deltafold.merging.methods import CONSENSUS, SPARSIFIERS
from deltafold.merging.methods.consensus import WHOLE_WEIGHTS
from deltafold.merging.recipe import Recipe
from deltafold.merging.sources import Source
from deltafold.names import block_of, role_of

CHUNK = 1 << 18  # entries of each model that are compared at a time
LARGE_BYTES = 1 << 28  # of a tensor's deltas in fp32


@dataclass(frozen=True)
class Reading:
    """A tensor of the base (fp32), the models' deltas, and which rows the base does not have."""

    ground: torch.Tensor
    deltas: list[torch.Tensor]
    new: torch.Tensor | None = None


@dataclass(frozen=True)
class Tensors:
    """The tensors of one merge. `seed` is of the sparsifiers' random choices."""

    inputs: Inputs
    seed: int

    def is_float(self, name: str) -> bool:
        return DTYPES[self.inputs.layout[name][0]].is_floating_point

    def memory_bytes(self, name: str, recipe: Recipe) -> int:
        """What work on a tensor holds: fp32 of base, merged and working copies, and of each delta,
        twice where a sparsifier makes another."""
        k, dense = len(self.inputs.models), recipe.rules[0] == "none"
        return 4 * self.elements(name) * (4 + (k if dense else 2 * k))

    def is_large(self, name: str) -> bool:
        """Whether to read deltas twice rather than to hold them twice."""
        by_rows = name in self.inputs.by_row and not self.inputs.settled.is_plain
        return not by_rows and 4 * self.elements(name) * len(self.inputs.models) > LARGE_BYTES

    def elements(self, name: str) -> int:
        return math.prod(self.inputs.layout[name][1])

    def head(self, name: str) -> dict[str, Any]:
        """What a row of the record begins with."""
        return {"name": name, "role": role_of(name), "block": block_of(name)}

    def read(self, name: str, recipe: Recipe) -> Reading:
        """Raises NonFiniteError, ArchiveError, MismatchError."""
        inputs = self.inputs
        if name not in inputs.by_row or inputs.settled.is_plain:
            ground = inputs.base.tensor(name).float()
            return Reading(ground, [self._delta(each, name, ground) for each in inputs.models])
        return self._read_rows(name, recipe)

    def _delta(self, source: Source, name: str, ground: torch.Tensor) -> torch.Tensor:
        theirs = source.tensor(name).float()
        constants = _constants(theirs, ground)
        delta = theirs.sub_(ground)
        if constants is not None:
            delta[constants] = 0
        return _finite(delta, source, name)

    def _read_rows(self, name: str, recipe: Recipe) -> Reading:
        """Rows where their tokens go. A row that the base lacks is the mean of those that models
        have, by their weights; no model changes it."""
        inputs, settled = self.inputs, self.inputs.settled
        ground = torch.zeros(inputs.layout[name][1])
        kept = _put(ground, inputs.base.tensor(name).float(), settled.base_rows)
        weights = [recipe.weight_at(model, name, inputs.n_blocks) for model in recipe.models]
        even = not any(weights)
        total, share, deltas = torch.zeros_like(ground), torch.zeros(len(ground)), []
        for source, weight, rows in zip(inputs.models, weights, settled.model_rows, strict=True):
            whole = torch.zeros_like(ground)
            known = _put(whole, _finite(source.tensor(name).float(), source, name), rows)
            total.add_(whole, alpha=1.0 if even else weight)
            share += known * (1.0 if even else weight)
            whole[~(known & kept)] = 0
            whole[known & kept] -= ground[known & kept]
            deltas.append(whole)
        divisor = torch.where(share == 0, 1.0, share).reshape(-1, *[1] * (ground.dim() - 1))
        ground[~kept] = (total / divisor)[~kept]
        return Reading(ground, deltas, ~kept)

    def merged(
        self, name: str, reading: Reading, recipe: Recipe, last: bool = False
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The merged delta, in its shape, before its scale, and figures of it (see `figures_of`).

        `last`: nothing else is made of the reading. A large tensor's deltas then give way to their
        sparse copies, and are read once more for the figures, one at a time.
        """
        sparsifier, consensus = recipe.rules
        numbers, n_blocks = recipe.all_numbers(), self.inputs.n_blocks
        weights = [recipe.weight_at(model, name, n_blocks) for model in recipe.models]
        again = last and sparsifier != "none" and self.is_large(name)
        sparse = []
        for n, model in enumerate(recipe.models):
            density = recipe.density_at(model, name, n_blocks)
            key = derive_key(self.seed, name, f"merge {n}")
            sparse.append(SPARSIFIERS[sparsifier](reading.deltas[n], density, key, numbers))
            if again:
                reading.deltas[n] = sparse[n]
        kept = [_norm(each) for each in sparse]
        if consensus in WHOLE_WEIGHTS:
            ground = reading.ground
            merged = CONSENSUS[consensus]([d + ground for d in sparse], weights, numbers)
            merged.sub_(ground)
        else:
            merged = CONSENSUS[consensus](sparse, weights, numbers)
        if reading.new is not None:
            merged[reading.new] = 0
        if not again:
            return merged, figures_of(merged, reading.deltas, kept)
        sparse.clear()
        reading.deltas.clear()
        deltas = (self._delta(source, name, reading.ground) for source in self.inputs.models)
        return merged, figures_of(merged, deltas, kept)

    def added(
        self, name: str, ground: torch.Tensor, merged: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The merged tensor in the base's dtype. `ground` and `merged`, of one shape, are used up."""
        return rounded_sum(ground, merged.mul_(scale), DTYPES[self.inputs.layout[name][0]])


def _put(into: torch.Tensor, rows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Row `places[j]` of `rows` becomes row j, unless it is -1; a mask of those that were put."""
    index = torch.tensor(places)
    known = index >= 0
    into[known] = rows[index[known]]
    return known


def _constants(theirs: torch.Tensor, ground: torch.Tensor) -> torch.Tensor | None:
    """Where both hold the same infinity or NaN, as masks do; None if there are none."""
    if not ground.numel() or all(bool(end.isfinite()) for end in ground.aminmax()):
        return None
    return ~ground.isfinite() & ((theirs == ground) | (theirs.isnan() & ground.isnan()))


def _finite(tensor: torch.Tensor, source: Source, name: str) -> torch.Tensor:
    if not all_finite(tensor):
        raise NonFiniteError(f"{name} of {source.label} holds NaN or infinite values.")
    return tensor


def _norm(tensor: torch.Tensor) -> float:
    parts = tensor.reshape(-1).split(CHUNK)  # all of it in fp64 would be the largest thing held
    return math.hypot(*(float(torch.linalg.vector_norm(p, dtype=torch.float64)) for p in parts))


def figures_of(
    merged: torch.Tensor, deltas: Iterable[torch.Tensor], kept: Sequence[float]
) -> dict[str, Any]:
    """Of a merged delta, at scale 1; the deltas have the same shape.

    `norm`; `kept`: each delta's norm after the sparsifier; `brought`: how much of each delta is in
    the merged one, <merged, D_i> / <D_i, D_i>: 1 where it is there in full, None where it is zero.
    """
    flat, brought = merged.reshape(-1), []
    for delta in deltas:
        along = square = 0.0
        own = delta.reshape(-1)
        for start in range(0, len(own), CHUNK):
            part = own[start : start + CHUNK].double()
            along += float(part @ flat[start : start + CHUNK].double())
            square += float(part @ part)
        brought.append(along / square if square else None)
    return {"norm": _norm(merged), "kept": list(kept), "brought": brought}


def scaled_figures(figures: dict[str, Any], scale: float) -> dict[str, Any]:
    """The figures of the delta times its scale."""
    brought = [None if each is None else each * scale for each in figures["brought"]]
    return figures | {"norm": figures["norm"] * abs(scale), "brought": brought}


def agreement(deltas: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Norms of deltas, their cosines (pairs in order), and the share of entries agreed in sign.

    Deltas have one shape. The share is over entries that at least two models change; None where
    there are none. `shared` is their number.
    """
    flat = [delta.reshape(-1) for delta in deltas]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    shared = agreed = 0
    for start in range(0, len(flat[0]), CHUNK):
        part = torch.stack([each[start : start + CHUNK] for each in flat])
        wide = part.double()
        gram += wide @ wide.T
        positive, negative = (part > 0).sum(0), (part < 0).sum(0)
        several = (positive + negative) >= 2
        shared += int(several.sum())
        agreed += int((several & ((positive == 0) | (negative == 0))).sum())
    norms = gram.diagonal().sqrt()
    scale = (norms[:, None] * norms).clamp_min(1e-300)
    above = torch.triu_indices(len(flat), len(flat), offset=1)
    return {
        "norms": norms.tolist(),
        "cosines": (gram / scale)[above[0], above[1]].tolist(),
        "agreed": agreed / shared if shared else None,
        "shared": shared,
    }
