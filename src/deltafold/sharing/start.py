"""The factors that a shared model starts from, read off the checkpoint, a layer at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from deltafold.blocks.align import match
from deltafold.blocks.layout import Layout
from deltafold.blocks.reading import read_layout
from deltafold.blocks.units import Units, features, rearranged
from deltafold.calibration import Calibration
from deltafold.composed.form import Linear
from deltafold.composed.write import Source
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace
from deltafold.sharing.methods.initialise import INITIALISATIONS, least_scale
from deltafold.sharing.methods.plan import Place, Plan

SCALE_ROUNDS = 3
RESULTS = "start"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Alignment:
    """The order of a block's neurons, by kind, that brings them nearest to its anchor's."""

    layout: Layout
    units: list[Units]
    orders: dict[str, torch.Tensor]

    def ordered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the block, of any shape, with its neurons in that order."""
        split = self.layout.split(name)
        assert split is not None
        kinds = [kind for kind in self.units if kind.name in self.orders]
        return rearranged(kinds, self.orders, split[1], tensor)


@dataclass
class Start:
    """Makes the factors of a plan. `changed` collects biases whose neurons were put in order.

    What a layer becomes goes through the workspace, so that layers may be made elsewhere.
    """

    source: Source
    plan: Plan
    how: str = "svd"
    align: bool = False
    calibration: Calibration | None = None
    seed: int = 0
    changed: Tensors = field(default_factory=dict)

    def factors(self, workspace: Workspace, resources: Resources | None = None) -> Tensors:
        """All factors by name, fp32: A (rank, in), B (rows, rank), scales (out,)."""
        form = self.plan.form()
        layout, units = read_layout(self.source.checkpoint) if self.align else (None, [])
        tasks: list[Task] = []
        files: list[str] = []
        for place in self.plan.places:
            alignment = self._alignment(place, layout, units)
            for layer in self.plan.structure.of(place.block, self.plan.parts):
                path = self.plan.structure.path(place.block, layer.local)
                entry, moved = form.linears[path], layer.bias and alignment is not None
                if not moved and not list(entry.factors(path)):
                    continue
                files.append(f"{RESULTS}/{len(files):05d}.safetensors")
                tasks.append(
                    Task(
                        path,
                        partial(self._save, workspace, files[-1], path, entry, alignment),
                        memory_bytes=32 * layer.weights,
                        work=float(layer.weights * max(1, place.read_rank)),
                    )
                )
        (resources or Resources()).run("start", tasks)
        made = {n: each for file in files for n, each in workspace.load_tensors(file).items()}
        factors = {name: made.pop(name) for name in form.factors()}
        self.changed |= made
        return factors

    def _save(
        self,
        workspace: Workspace,
        file: str,
        path: str,
        entry: Linear,
        alignment: Alignment | None,
    ) -> None:
        """What one layer becomes: its factors, and its bias if that has moved with its neurons."""
        made = self._layer(path, entry, alignment)
        if entry.bias and alignment is not None:
            name = self.source.tensor_of(f"{path}.bias")
            made[f"{path}.bias"] = alignment.ordered(name, self.source.checkpoint.tensor(name))
        tensors = {name: each.cpu().contiguous() for name, each in made.items()}
        workspace.save_tensors(file, tensors)

    def _layer(self, path: str, entry: Linear, alignment: Alignment | None) -> Tensors:
        name = self.source.tensor_of(f"{path}.weight")
        weight = self.source.checkpoint.tensor(name).float()
        if alignment is not None:
            weight = alignment.ordered(name, weight)
        anchor = None
        if entry.weight is not None:
            name = self.source.tensor_of(f"{entry.weight}.weight")
            anchor = self.source.checkpoint.tensor(name).float()
            anchor = anchor.T if entry.transposed else anchor
        weight = weight.T if entry.transposed else weight
        second = self._second(path, entry, alignment)
        return composed_values(path, entry, weight, anchor, second, self.how, self.seed)

    def _second(self, path: str, entry: Linear, alignment: Alignment | None) -> torch.Tensor | None:
        """E[x x^T] of the layer's inputs, its neurons in the order that they are put in."""
        if self.calibration is None:
            return None
        moments = self.calibration.moments(self.source.tensor_of(f"{path}.weight"))
        if moments is None:
            return None
        second = moments.second
        for order in alignment.orders.values() if alignment is not None else ():
            writes = any(
                layer.writes and path.endswith(f".{layer.local}")
                for layer in self.plan.structure.layers[0]
            )
            if writes and len(order) == entry.shape[1]:
                second = second[order] if second.ndim == 1 else second[order][:, order]
        return second

    def _alignment(
        self, place: Place, layout: Layout | None, units: list[Units]
    ) -> Alignment | None:
        if layout is None or place.anchor is None:
            return None
        read = self.source.checkpoint.tensor
        here, there = place.block, place.anchor
        orders = {
            kind.name: match(
                features(kind, lambda local: read(layout.name(there, local))),
                features(kind, lambda local: read(layout.name(here, local))),
            )
            for kind in units
            if kind.name != "heads"
        }
        return Alignment(layout, units, orders) if orders else None


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
