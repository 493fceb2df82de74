"""Many merges of the same models, formed in one pass, so that one of them can be chosen.

    for each tensor: base and deltas are read once, then for each way to sparsify and combine
                     its merged delta (fp32, at scale 1) is kept in the workspace
    candidate      = base + scale * merged delta, rounded once: the bytes that `merge` would write

Candidates that differ by their scale alone share a merged delta. What is kept stays for the next
try of the same command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deltafold.merging.recipe import Recipe
from deltafold.merging.tensors import Tensors, agreement, scaled_figures
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace

Choose = Callable[["Formed"], tuple[int, dict[str, Any]]]
"""Given the candidates: the number of the one to keep, and what the record says of the search."""


class Formed:
    """The candidates of one search. `recipes` differ in scales and densities."""

    def __init__(self, tensors: Tensors, recipes: Sequence[Recipe], workspace: Workspace):
        self.tensors, self.recipes, self.workspace = tensors, recipes, workspace
        self.names = list(tensors.inputs.layout)
        self._ways: list[Recipe] = []  # one of each way to combine, at scale 1
        self._number = {name: n for n, name in enumerate(self.names)}
        for recipe in recipes:
            if _at_one(recipe) not in self._ways:
                self._ways.append(_at_one(recipe))

    @property
    def disk_bytes(self) -> int:
        """What the merged deltas take."""
        return 4 * len(self._ways) * sum(map(self.tensors.elements, self.names))

    @property
    def files(self) -> dict[str, bytes]:
        """Config, tokenizer and the like of every candidate."""
        return self.tensors.inputs.files

    def form(self, resources: Resources) -> None:
        """Read base and models, and keep every merged delta. What is there is not made again."""
        tasks = [
            Task(
                name,
                partial(self._form, name),
                memory_bytes=self.tensors.memory_bytes(name, self.recipes[0]),
                work=float(self.tensors.elements(name)),
            )
            for name in self.names
            if self.tensors.is_float(name) and not self.workspace.has(self._figures_file(name))
        ]
        resources.run("form", tasks)

    def _form(self, name: str) -> None:
        reading = self.tensors.read(name, self._ways[0])
        row: dict[str, Any] = {"deltas": agreement(reading.deltas), "ways": []}
        kept: list[str] = []
        if reading.new is not None:  # rows that no model of the base's has: not to be read again
            kept.append(self._file(name, "base"))
            self.workspace.save_tensors(kept[-1], {"rows": reading.ground})
        for number, way in enumerate(self._ways):
            merged, figures = self.tensors.merged(name, reading, way)
            kept.append(self._file(name, number))
            self.workspace.save_tensors(kept[-1], {"rows": merged})
            row["ways"].append(figures)
        self.workspace.save_json(self._figures_file(name), row, of=kept)

    def finished(self, name: str, recipe: Recipe) -> tuple[torch.Tensor, dict[str, Any]]:
        """A tensor of a candidate as it would be written, in its shape, and its figures."""
        way, scale = self._ways.index(_at_one(recipe)), self._scale(name, recipe)
        row = self.workspace.load_json(self._figures_file(name))
        figures = row["deltas"] | scaled_figures(row["ways"][way], scale)
        return self._whole(name, way, scale), figures

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """All tensors of candidate `number`, in their shapes, in memory."""
        recipe = self.recipes[number]
        way = self._ways.index(_at_one(recipe))
        return {
            name: self._whole(name, way, self._scale(name, recipe))
            if self.tensors.is_float(name)
            else self.tensors.inputs.base.tensor(name)
            for name in self.names
        }

    def _whole(self, name: str, way: int, scale: float) -> torch.Tensor:
        if self.workspace.has(self._file(name, "base")):
            ground = self.workspace.load_tensor(self._file(name, "base"), "rows")
        else:
            ground = self.tensors.inputs.base.tensor(name).float()
        merged = self.workspace.load_tensor(self._file(name, way), "rows")
        return self.tensors.added(name, ground, merged, scale)

    def _scale(self, name: str, recipe: Recipe) -> float:
        return recipe.scale_at(name, self.tensors.inputs.n_blocks)

    def _file(self, name: str, way: int | str) -> str:
        return f"formed/{way}/{self._number[name]:06d}.safetensors"

    def _figures_file(self, name: str) -> str:
        return f"formed/{self._number[name]:06d}.json"

    def known_score(self, number: int) -> Any:
        """The score that was kept of a candidate, None if there is none."""
        file = f"scores/{number:04d}.json"
        return self.workspace.load_json(file) if self.workspace.has(file) else None

    def keep_score(self, number: int, score: Any) -> None:
        self.workspace.save_json(f"scores/{number:04d}.json", json.loads(json.dumps(score)))


def _at_one(recipe: Recipe) -> Recipe:
    return replace(recipe, scale=1.0)
