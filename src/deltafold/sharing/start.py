"""The factors that a shared model starts from, read off the checkpoint, a layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from deltafold.blocks.align import match
from deltafold.blocks.layout import Layout
from deltafold.blocks.reading import read_layout
from deltafold.blocks.structure import Layer
from deltafold.blocks.units import Units, features, rearranged
from deltafold.calibration import Calibration
from deltafold.composed.form import Linear
from deltafold.composed.write import Source
from deltafold.errors import UsageError, nearest
from deltafold.running.engine import Progress, Task, run_tasks
from deltafold.sharing.methods.initialise import INITIALISATIONS, least_scale
from deltafold.sharing.methods.plan import Place, Plan

FIT = "fit"
SCALE_ROUNDS = 3
STARTS = (*INITIALISATIONS, FIT)
Tensors = dict[str, torch.Tensor]


def check_start(how: str, align: bool, plan_parts: Sequence[str]) -> None:
    """Raises UsageError for a start that cannot be."""
    if how not in STARTS:
        raise UsageError(f"There is no start {how!r}; {nearest(how, list(STARTS))}")
    if align and "mlp" not in plan_parts:
        raise UsageError(
            "Only neurons of MLPs are aligned, and none are shared; leave out --align."
        )


@dataclass
class Start:
    """Makes the factors of a plan. `changed` collects biases whose neurons were put in order."""

    source: Source
    plan: Plan
    how: str = "svd"
    align: bool = False
    calibration: Calibration | None = None
    seed: int = 0
    changed: dict[str, torch.Tensor] = field(default_factory=dict)

    def factors(
        self,
        workers: int | None = None,
        memory_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """All factors by name, fp32."""
        form, made = self.plan.form(), {}
        layout, units = read_layout(self.source.checkpoint) if self.align else (None, [])
        orders = {place: self._orders(place, layout, units) for place in self.plan.places}

        def one(place: Place, layer: Layer) -> None:
            path = self.plan.structure.path(place.block, layer.local)
            weight = self._weight(path, orders[place], layout, units)
            if layer.bias and orders[place]:
                name = self.source.tensor_of(f"{path}.bias")
                held = self.source.checkpoint.tensor(name)
                self.changed[f"{path}.bias"] = _ordered(name, held, orders[place], layout, units)
            made.update(self._layer(path, form.linears[path], weight, orders[place]))

        tasks = [
            Task(
                self.plan.structure.path(place.block, layer.local),
                lambda p=place, e=layer: one(p, e),  # type: ignore[misc]
                memory_bytes=32 * layer.weights,
                work=float(layer.weights * max(1, place.read_rank)),
            )
            for place in self.plan.places
            for layer in self.plan.structure.of(place.block, self.plan.parts)
        ]
        run_tasks("start", tasks, workers, memory_bytes, progress)
        return {name: made[name] for name in form.factors()}

    def _weight(
        self, path: str, orders: dict[str, torch.Tensor], layout: Layout | None, units: list[Units]
    ) -> torch.Tensor:
        name = self.source.tensor_of(f"{path}.weight")
        held = self.source.checkpoint.tensor(name).float()
        return _ordered(name, held, orders, layout, units) if orders else held

    def _layer(
        self, path: str, entry: Linear, weight: torch.Tensor, orders: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        anchor = None
        if entry.weight is not None:
            name = self.source.tensor_of(f"{entry.weight}.weight")
            anchor = self.source.checkpoint.tensor(name).float()
            anchor = anchor.T if entry.transposed else anchor
        weight = weight.T if entry.transposed else weight
        second = self._second(path, entry, orders)
        return composed_values(path, entry, weight, anchor, second, self.how, self.seed)

    def _second(
        self, path: str, entry: Linear, orders: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """E[x x^T] of the layer's inputs, its neurons in the order that they are put in."""
        if self.calibration is None:
            return None
        moments = self.calibration.moments(self.source.tensor_of(f"{path}.weight"))
        if moments is None:
            return None
        second = moments.second
        for order in orders.values():
            writes = any(
                layer.writes and path.endswith(f".{layer.local}")
                for layer in self.plan.structure.layers[0]
            )
            if writes and len(order) == entry.shape[1]:
                second = second[order] if second.ndim == 1 else second[order][:, order]
        return second

    def _orders(
        self, place: Place, layout: Layout | None, units: list[Units]
    ) -> dict[str, torch.Tensor]:
        """For each kind of neuron the order that brings it nearest to the anchor's."""
        if layout is None or place.anchor is None:
            return {}
        read = self.source.checkpoint.tensor
        here, there = place.block, place.anchor
        return {
            kind.name: match(
                features(kind, lambda local: read(layout.name(there, local))),
                features(kind, lambda local: read(layout.name(here, local))),
            )
            for kind in units
            if kind.name != "heads"
        }


def composed_values(
    path: str,
    entry: Linear,
    weight: torch.Tensor,
    anchor: torch.Tensor | None,
    second: torch.Tensor | None,
    how: str,
    seed: int,
) -> Tensors:
    """Scale and factors, by name, for which a layer is nearest to `weight` (out, in).

    `anchor` is of the same shape; `second` E[x x^T] of the inputs, or its diagonal.
    """
    if anchor is None or not entry.scale:
        return _factors(
            path, entry, weight if anchor is None else weight - anchor, second, how, seed
        )
    scale = torch.ones(len(anchor)) if how == "zero" else torch.zeros(len(anchor))
    scale = scale.to(anchor)
    made = _factors(path, entry, weight - scale[:, None] * anchor, second, how, seed)
    for _ in range(0 if how == "zero" else SCALE_ROUNDS):
        # Each half is the best for the other: never farther from the weight than factors alone.
        product = torch.cat(
            [
                made[f"{path}.delta.{number}.b"] @ made[f"{path}.delta.{number}.a"]
                for number in range(len(entry.parts))
            ]
        )
        scale = least_scale(weight - product, anchor, second)
        made = _factors(path, entry, weight - scale[:, None] * anchor, second, how, seed)
    return {f"{path}.scale": scale} | made


def _factors(
    path: str,
    entry: Linear,
    weight: torch.Tensor,
    second: torch.Tensor | None,
    how: str,
    seed: int,
) -> Tensors:
    made: Tensors = {}
    start = 0
    for number, part in enumerate(entry.parts):
        name = f"{path}.delta.{number}"
        rows = weight[start : start + part.rows]
        a, b = INITIALISATIONS[how](rows, part.rank, second, name, seed)
        made |= {f"{name}.a": a, f"{name}.b": b}
        start += part.rows
    return made


def _ordered(
    name: str,
    tensor: torch.Tensor,
    orders: dict[str, torch.Tensor],
    layout: Layout | None,
    units: list[Units],
) -> torch.Tensor:
    assert layout is not None
    split = layout.split(name)
    assert split is not None
    kinds = [kind for kind in units if kind.name in orders]
    return rearranged(kinds, orders, split[1], tensor)
