"""The factors of one unit: weights and moments of its matrices in, tensors of the form out.

NAME.delta.0.a, NAME.delta.0.b   of a layer; A belongs to the first block of a group
NAME.bias                        where the mean is kept by a bias
NAME_delta.a, .b, .mean          of stacked experts (E, r, i), (E, o, r), (o, i)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deltafold.checkpoint import DTYPES
from deltafold.coding.counter import derive_key
from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods.basis import refit, shared_basis
from deltafold.factoring.methods.experts import mean_and_deltas
from deltafold.factoring.methods.factors import Factored, input_gram, with_bias
from deltafold.factoring.methods.matrices import Matrix
from deltafold.factoring.methods.units import Unit
from deltafold.linalg.matrices import Moments
from deltafold.linalg.whitening import output_error
from deltafold.running.devices import put

Tensors = dict[str, torch.Tensor]
MomentsOf = Callable[[str], Moments | None]
"""A checkpoint tensor -> the moments of its inputs; None where they are not known."""


@dataclass(frozen=True)
class MadeUnit:
    """Tensors of a unit in the dtype that they are stored in, and what they cost.

    `lost` and `whole` are E|W x - W' x|^2 and E|W x|^2 by module, of the matrices themselves where
    inputs are not known.
    """

    tensors: Tensors
    lost: dict[str, float]
    whole: dict[str, float]


def read_matrix(job: FactorJob, matrix: Matrix, expert: int = 0) -> torch.Tensor:
    """The weight of a layer, or of one expert: (out, in), fp32, where heavy steps compute."""
    parts = [put(job.checkpoint.tensor(name), torch.float32) for name in matrix.tensors[expert]]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.T.contiguous() if matrix.transposed else whole


def stored_dtype(job: FactorJob, matrix: Matrix) -> torch.dtype:
    """The dtype that factors are stored in: that of the weight."""
    return DTYPES[job.checkpoint.tensors[matrix.tensors[0][0]].dtype]


def make_unit(job: FactorJob, unit: Unit, rank: int, moments_of: MomentsOf) -> MadeUnit:
    """Factors of a unit at a rank: A (r, in) of the unit, B (out, r) and bias (out,) of each matrix.

    Of stacked experts (E, r, in), (E, out, r), and their mean (out, in).
    """
    if job.matrices[unit.name].stacked:
        return _stacked(job, unit, rank, moments_of)
    members = [job.matrices[module] for module in unit.modules]
    weights = [read_matrix(job, matrix) for matrix in members]
    known = [_near(moments_of(matrix.tensors[0][0])) for matrix in members]
    whitened = known if job.method.whitened else [None] * len(known)
    grams = [input_gram(each, job.centred) for each in whitened]
    a, coefficients = shared_basis(
        weights, grams, rank, derive_key(job.request.seed, unit.name), job.request.damping
    )
    dtype = stored_dtype(job, members[0])
    a = a.to(dtype)
    tensors: Tensors = {f"{unit.name}.delta.0.a": a}
    lost, whole = {}, {}
    for matrix, weight, gram, b, each in zip(
        members, weights, grams, coefficients, known, strict=True
    ):
        if len(members) > 1 and job.request.refit:
            b = refit(weight, a, gram)
        b = b.to(dtype)
        tensors[f"{matrix.module}.delta.0.b"] = b
        if job.centred:
            bias = with_bias(weight, Factored(b, a), each).bias
            own = put(job.checkpoint.tensor(matrix.bias), torch.float64) if matrix.bias else 0.0
            if bias is not None:
                tensors[f"{matrix.module}.bias"] = (bias + own).to(dtype)
        seen = gram if gram is not None else None if each is None else each.second
        lost[matrix.module], whole[matrix.module] = output_error(
            weight, b.double() @ a.double(), seen
        )
    return MadeUnit(_stored(tensors), lost, whole)


def _stacked(job: FactorJob, unit: Unit, rank: int, moments_of: MomentsOf) -> MadeUnit:
    """Experts of one block, with their mean where the method stores it."""
    matrix = job.matrices[unit.name]
    weights = [read_matrix(job, matrix, n) for n in range(len(matrix.tensors))]
    known = [_near(moments_of(names[0])) for names in matrix.tensors]
    grams = [
        None if each is None or not job.method.whitened else each.second.double() for each in known
    ]
    mean, a, b = mean_and_deltas(
        weights, grams, rank, derive_key(job.request.seed, unit.name), unit.anchors > 0,
        job.request.damping,
    )  # fmt: skip
    dtype = stored_dtype(job, matrix)
    tensors = {f"{unit.name}_delta.a": a.to(dtype), f"{unit.name}_delta.b": b.to(dtype)}
    if mean is not None:
        tensors[f"{unit.name}_delta.mean"] = mean.to(dtype)
    lost = whole = 0.0
    base = 0.0 if mean is None else mean
    for n, (weight, gram) in enumerate(zip(weights, grams, strict=True)):
        one = output_error(weight, base + b[n] @ a[n], gram)
        lost, whole = lost + one[0], whole + one[1]
    return MadeUnit(_stored(tensors), {unit.name: lost}, {unit.name: whole})


def _near(moments: Moments | None) -> Moments | None:
    if moments is None:
        return None
    return Moments(put(moments.second), put(moments.mean), moments.tokens)


def _stored(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
