"""The form of a factored model: which layers have factors, and whose."""

from __future__ import annotations

from deltafold.composed.form import Experts, Form, Linear, Part
from deltafold.factoring.job import FactorJob
from deltafold.factoring.methods.units import Ranks


def factored_form(job: FactorJob, ranks: Ranks, share: float) -> Form:
    """Entries of all units that have a rank; lenders stand before those that borrow."""
    linears: dict[str, Linear] = {}
    experts: dict[str, Experts] = {}
    for unit, rank in zip(job.units, ranks, strict=True):
        if rank is None:
            continue
        for module in unit.modules:
            matrix = job.matrices[module]
            if matrix.stacked:
                experts[module] = Experts(
                    count=len(matrix.tensors), shape=matrix.shape, rank=rank, mean=unit.anchors > 0
                )
                continue
            lender = None if module == unit.name else f"{unit.name}.delta.0"
            linears[module] = Linear(
                shape=matrix.shape,
                bias=job.centred or matrix.bias is not None,
                transposed=matrix.transposed,
                parts=(Part(rows=matrix.shape[0], rank=rank, a=lender),),
            )
    return Form(
        method={"name": job.method.name, "parameters": share}, linears=linears, experts=experts
    )
