"""One `factor` run: the layers of a model, what is factored together, and how much may stay.

Reads headers and the config only: the model is built without weights, to know its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from deltafold.calibration.building import build, find_blocks, find_stacks
from deltafold.calibration.models import is_causal
from deltafold.calibration.usage import is_conv1d, is_linear, is_rewritten, tied_layers
from deltafold.checkpoint import DTYPES, Checkpoint
from deltafold.composed.write import Source
from deltafold.errors import BudgetError, MismatchError
from deltafold.factoring.methods.basis import neighbours
from deltafold.factoring.methods.bolaco import fewest
from deltafold.factoring.methods.matrices import Matrix, matrix_role
from deltafold.factoring.methods.presets import SHARED_ROLES, Method
from deltafold.factoring.methods.units import Unit, smallest
from deltafold.factoring.request import FactorRequest


@dataclass(frozen=True)
class FactorJob:
    """What is asked for: a method, and how many of the parameters may be stored.

    `matrices` are by module name, in the order of blocks; `total` counts every tensor of the
    checkpoint. Tasks take the job along, to other processes too.
    """

    checkpoint: Checkpoint
    source: Source
    method: Method
    matrices: dict[str, Matrix]
    units: list[Unit]
    total: int
    blocks: int
    request: FactorRequest

    @property
    def centred(self) -> bool:
        """Whether the mean of outputs is kept by a bias."""
        return _is_centred(self.request, self.method)

    @property
    def dense(self) -> int:
        """Parameters of all matrices that are factored."""
        return sum(unit.dense for unit in self.units)

    @property
    def budget(self) -> int:
        """Parameters that the units may have."""
        return int(self.request.parameters * self.total + 1e-6) - (self.total - self.dense)

    def regrouped(self, groups: dict[str, list[tuple[int, ...]]]) -> FactorJob:
        """The job with other groups of blocks for each kind of layer."""
        return replace(self, units=_units(self.matrices, self.method, groups, self.centred))

    def least_share(self) -> float:
        """The smallest share of parameters that the method can keep."""
        least = fewest(self.units) if self.method.ranking == "search" else smallest(self.units)
        return (self.total - self.dense + least) / self.total


def make_job(checkpoint: Checkpoint, method: Method, request: FactorRequest) -> FactorJob:
    """The job. Raises BudgetError, MismatchError, each with what would be possible."""
    if "quantization_config" in checkpoint.config():
        raise MismatchError(
            f"{checkpoint.label} holds quantised weights; factor it unquantised, then quantise."
        )
    source = Source.of(checkpoint)
    model, names = _blocks(checkpoint, method.looks or bool(request.text or request.tasks))
    found = _matrices(model, names, source)
    chosen = {m.module: m for m in found if _is_wanted(m, method)}
    if not chosen:
        raise MismatchError(_nothing(checkpoint.label, method))
    by_kind: dict[str, list[tuple[int, ...]]] = {}
    for local in {matrix.local for matrix in chosen.values()}:
        same = [m for m in chosen.values() if m.local == local]
        by_kind[local] = neighbours(
            [m.block for m in same], _group_size(method, same[0], request.group)
        )
    job = FactorJob(
        checkpoint,
        source,
        method,
        chosen,
        _units(chosen, method, by_kind, _is_centred(request, method)),
        sum(info.elements for info in checkpoint.tensors.values()),
        len(names),
        request,
    )
    least = job.least_share()
    if request.parameters < least:
        raise BudgetError(
            f"{checkpoint.label} keeps at least {least:.1%} of its parameters by method "
            f"{method.name}, with every rank 1, not {request.parameters:.1%}; ask for a larger share."
        )
    return job


def _blocks(checkpoint: Checkpoint, runs: bool) -> tuple[Any, list[str]]:
    """The model without weights, and its blocks; a model that `runs` on text must be one of language.

    Raises MismatchError, CheckpointError.
    """
    model = build(checkpoint.path, causal=runs)
    if runs or is_causal(type(model), model.config):
        return model, find_blocks(model, checkpoint.path)[1]
    return model, find_stacks(model)


def _is_centred(request: FactorRequest, method: Method) -> bool:
    return request.centre and method.whitened


def _is_wanted(matrix: Matrix, method: Method) -> bool:
    if method.mean:
        return matrix.stacked
    return method.roles is None or (matrix.role in method.roles and not matrix.stacked)


def _nothing(label: str, method: Method) -> str:
    if method.mean:
        return (
            f"{label} has no experts that are stacked, and moe is for models with experts; choose "
            "lord."
        )
    if method.roles is None:
        return (
            f"{label} has no blocks with linear layers of their own, so there is nothing to factor."
        )
    return f"{label} has no layers that {method.name} factors; choose lord."


def _group_size(method: Method, matrix: Matrix, group: int) -> int:
    shares = method.grouped and matrix.role in SHARED_ROLES and not matrix.stacked
    return group if shares else 1


def _matrices(model: nn.Module, names: Sequence[str], source: Source) -> list[Matrix]:
    """Linear layers and stacked experts of the decoder's blocks, in their order."""
    found, tied = [], tied_layers(model)
    for block, prefix in enumerate(names):
        for path, module in model.get_submodule(prefix).named_modules():
            name = f"{prefix}.{path}"
            fixed = name in tied or is_rewritten(model, name)
            layer = None if fixed else _layer(source, name, module, block)
            found += [layer] if layer else []
            for leaf, parameter in module.named_parameters(recurse=False):
                if f"{name}.{leaf}" in source.stacks and parameter.ndim == 3:
                    found.append(_stack(source, f"{name}.{leaf}", parameter.shape, block))
    return found


def _layer(source: Source, name: str, module: nn.Module, block: int) -> Matrix | None:
    transposed = is_conv1d(module)
    tensor = source.stored.get(f"{name}.weight")
    role = matrix_role(name)
    if tensor is None or role == "router" or not (transposed or is_linear(module)):
        return None
    info = source.checkpoint.tensors[tensor]
    dtype = DTYPES[info.dtype]
    if not dtype.is_floating_point or dtype.itemsize < 2 or len(info.shape) != 2:
        return None
    o, i = info.shape[::-1] if transposed else info.shape
    bias = source.stored.get(f"{name}.bias")
    return Matrix(name, ((tensor,),), block, role, (o, i), transposed, bias)


def _stack(source: Source, name: str, shape: Sequence[int], block: int) -> Matrix:
    experts, size = source.stacks[name], (shape[1], shape[2])
    return Matrix(name, experts, block, matrix_role(name), size, stacked=True)


def _units(
    matrices: dict[str, Matrix],
    method: Method,
    groups: dict[str, list[tuple[int, ...]]],
    centred: bool,
) -> list[Unit]:
    """Units in the order of their first block, then of its layers."""
    order = {module: place for place, module in enumerate(matrices)}
    at = {(m.local, m.block): m for m in matrices.values()}
    made = []
    for local, split in groups.items():
        for blocks in split:
            members = [at[local, block] for block in blocks]
            made.append(_unit(members, method, centred))
    return sorted(made, key=lambda unit: order[unit.modules[0]])


def _unit(members: list[Matrix], method: Method, centred: bool) -> Unit:
    first = members[0]
    o, i = first.shape
    more: dict[str, Any] = {}
    if first.stacked:
        more = {"owns_a": True, "anchors": int(method.mean)}
    elif centred:
        more = {"added": sum(o for m in members if m.bias is None)}
    return Unit(
        first.module,
        first.role,
        tuple(m.block for m in members),
        tuple(m.module for m in members),
        (o,) * (len(first.tensors) if first.stacked else len(members)),
        i,
        **more,
    )
