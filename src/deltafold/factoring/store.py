"""Factors on disk, and the model that they amount to, tensor by tensor when read."""

from __future__ import annotations

import functools

import torch

from deltafold.checkpoint import Checkpoint
from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods.matrices import Matrix
from deltafold.factoring.methods.units import Ranks, Unit
from deltafold.running.workspace import Workspace


class FactorStore:
    """Factors of finished units in a workspace, one file each; `figures` beside them.

    A tensor is found by its name in the form.
    """

    def __init__(self, job: FactorJob, workspace: Workspace, folder: str = "factors"):
        self.job, self.workspace, self.folder = job, workspace, folder
        self._unit_of = {
            module: number for number, unit in enumerate(job.units) for module in unit.modules
        }

    def file(self, number: int) -> str:
        """Where the factors of unit `number` lie, below the workspace."""
        return f"{self.folder}/{number:05d}.safetensors"

    def has(self, number: int) -> bool:
        return self.workspace.has(self._figures(number))  # which are those of the factors beside

    def save(
        self, number: int, tensors: dict[str, torch.Tensor], figures: dict[str, object]
    ) -> int:
        """Keep what a unit has become, tensors of any shape by their names in the form; their bytes."""
        self.workspace.save_tensors(self.file(number), tensors)
        self.workspace.save_json(self._figures(number), figures, of=[self.file(number)])
        return sum(each.numel() * each.element_size() for each in tensors.values())

    def figures(self, number: int) -> dict[str, dict[str, float]]:
        """What was said of a unit when it was saved."""
        found: dict[str, dict[str, float]] = self.workspace.load_json(self._figures(number))
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the form, in its stored shape."""
        module = name
        while module not in self._unit_of:
            module, dot, _ = module.rpartition(".")
            if not dot:
                module = name.partition("_delta.")[0]  # of stacked experts
                break
        return self.workspace.load_tensor(self.file(self._unit_of[module]), name)

    def changed(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """Biases (o,) that differ from the checkpoint's, by parameter."""
        if not self.job.centred:
            return {}
        return {
            f"{module}.bias": self.tensor(f"{module}.bias")
            for unit, rank in zip(self.job.units, ranks, strict=True)
            for module in unit.modules
            if rank is not None and self.job.matrices[module].bias is not None
        }

    def _figures(self, number: int) -> str:
        return f"{self.folder}/{number:05d}.json"


class Candidate:
    """The model with some units factored: `tensor` gives what stands under a checkpoint's name.

    Units without factors in the store are as they were. A layer that had no bias has one under
    MODULE.bias, zero until factors say otherwise.
    """

    def __init__(self, job: FactorJob, store: FactorStore | None, ranks: Ranks):
        self.job, self.store, self.ranks = job, store, ranks
        self.checkpoint: Checkpoint = job.checkpoint
        self.numbers = list(range(job.blocks))
        self._places: dict[str, tuple[Matrix, int, int]] = {}
        self._biases: dict[str, Matrix] = {}
        for matrix in job.matrices.values():
            self._biases[matrix.bias or f"{matrix.module}.bias"] = matrix
            for expert, names in enumerate(matrix.tensors):
                for part, name in enumerate(names):
                    self._places[name] = (matrix, expert, part)

    @functools.cached_property
    def _units(self) -> dict[str, tuple[int, Unit]]:
        return {
            module: (number, unit)
            for number, unit in enumerate(self.job.units)
            for module in unit.modules
        }

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name in the checkpoint, in its shape, as this candidate has it."""
        if name in self._places:
            matrix, expert, part = self._places[name]
            if self._is_factored(matrix):
                return self._weight(matrix, expert, part)
        elif name in self._biases and self.job.centred and not self._biases[name].stacked:
            return self._bias(name, self._biases[name])
        return self.checkpoint.tensor(name)

    def _is_factored(self, matrix: Matrix) -> bool:
        number, _ = self._units[matrix.module]
        return self.store is not None and self.ranks[number] is not None and self.store.has(number)

    def _weight(self, matrix: Matrix, expert: int, part: int) -> torch.Tensor:
        assert self.store is not None
        get, module = self.store.tensor, matrix.module
        if matrix.stacked:
            rows = matrix.shape[0] // len(matrix.tensors[expert])
            chosen = slice(part * rows, (part + 1) * rows)
            b = get(f"{module}_delta.b")[expert, chosen].float()
            made = b @ get(f"{module}_delta.a")[expert].float()
            if self._units[module][1].anchors:
                made += get(f"{module}_delta.mean")[chosen].float()
            return made
        a = get(f"{self._units[module][1].name}.delta.0.a").float()
        made = get(f"{module}.delta.0.b").float() @ a
        return made.T.contiguous() if matrix.transposed else made

    def _bias(self, name: str, matrix: Matrix) -> torch.Tensor:
        if self.store is not None and self._is_factored(matrix):
            return self.store.tensor(f"{matrix.module}.bias").float()
        if matrix.bias is not None:
            return self.checkpoint.tensor(name)
        return torch.zeros(matrix.shape[0])
