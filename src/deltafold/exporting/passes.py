"""The two passes of `export` over tensors: factor every delta, then write what was chosen of each.

factor   delta -> pair of as many components as may be wanted; its norm    FACTORS/n.safetensors
choose   ranks, from the singular values of all                            exporting/methods/ranks.py
write    the first components, rounded, into the adapter; what is lost     the error of each
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deltafold.checkpoint import DTYPE_NAMES, DTYPES
from deltafold.coding.counter import derive_key
from deltafold.exporting.engines import largest_rank
from deltafold.exporting.job import ExportJob, Item
from deltafold.exporting.methods.pairs import Pair, squared_error, stored_pair, svd_pair
from deltafold.exporting.methods.ranks import bytes_ranks, energy_rank
from deltafold.exporting.peft_files import pair_shapes
from deltafold.linalg.decomposition import svd_memory_bytes
from deltafold.linalg.matrices import Moments
from deltafold.restoring.decode import (
    check_base_tensor,
    decoded_delta,
    stored_factors,
)
from deltafold.running.engine import Resources, Task
from deltafold.running.workspace import Workspace

FACTORS = "factors"


@dataclass(frozen=True)
class Factored:
    """What the first pass knows of a tensor: |D|^2, where its pair comes from, singular values."""

    squared: float
    source: str
    s: list[float]


def dtype_of(item: Item, job: ExportJob) -> torch.dtype:
    """The dtype that a pair is written in: the base's, if it is an ordinary one."""
    dtype = DTYPES[job.base.tensors[item.name].dtype]
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return dtype if known else torch.float32


def component_bytes(item: Item, job: ExportJob) -> int:
    """Bytes of one component of a tensor's pair, at all its places."""
    return len(item.places) * sum(item.shape) * dtype_of(item, job).itemsize


def acting_delta(item: Item, job: ExportJob) -> torch.Tensor:
    """The delta (o, i) as it acts, fp32."""
    delta = decoded_delta(job.archive, item.tensor, job.base)
    return delta.T.contiguous() if item.transposed else delta


def factor(
    job: ExportJob,
    workspace: Workspace,
    moments: Mapping[str, Moments] | None,
    resources: Resources,
) -> dict[str, Factored]:
    """The first pass. Results of an earlier run are found again."""
    wanted = job.of("pair", "none")
    files = {item.name: f"{FACTORS}/{n:06d}" for n, item in enumerate(job.items)}

    def one(item: Item) -> None:
        if item.tensor.base is None:
            workspace.save_json(f"{files[item.name]}.json", [0.0, "", []])
            return
        check_base_tensor(job.archive, item.tensor, job.base)
        delta = acting_delta(item, job)
        squared, source, values = float(delta.square().sum(dtype=torch.float64)), "", []
        kept = []
        if item.how == "pair":
            pair, source = _pair(
                item, job, delta, None if moments is None else moments.get(item.name)
            )
            kept = [f"{files[item.name]}.safetensors"]
            workspace.save_tensors(kept[0], {"a": pair.a, "b": pair.b, "s": pair.s})
            values = pair.s.tolist()
        workspace.save_json(f"{files[item.name]}.json", [squared, source, values], of=kept)

    tasks = [
        Task(item.name, partial(one, item), _memory(item, job), float(_elements(item)))
        for item in wanted
        if not workspace.has(f"{files[item.name]}.json")
    ]
    resources.run("factor", tasks)
    return {
        item.name: Factored(*workspace.load_json(f"{files[item.name]}.json")) for item in wanted
    }


def _pair(
    item: Item, job: ExportJob, delta: torch.Tensor, moments: Moments | None
) -> tuple[Pair, str]:
    limit = largest_rank(job.runtime)
    rank = job.choice.components(item.shape, component_bytes(item, job), limit)
    found = stored_factors(job.archive, item.tensor, job.base)
    if found is not None and (job.choice.takes_stored or job.choice.rank):
        left, right = found[::-1] if item.transposed else found
        rank = min(limit or len(left), job.choice.rank or len(left))
        if len(left) <= rank:
            return stored_pair(left, right), "stored"
    key = derive_key(job.archive.manifest.seed, item.name, "export")
    looked_up = any(place.kind == "embedding" for place in item.places)  # no inputs to weigh by
    if moments is not None and not looked_up and len(moments.second) == item.shape[1]:
        return svd_pair(delta, rank, key, moments), "whitened"
    return svd_pair(delta, rank, key), "svd"


def _elements(item: Item) -> int:
    return item.shape[0] * item.shape[1]


def _memory(item: Item, job: ExportJob) -> int:
    held = 12 * _elements(item)
    if item.how != "pair":
        return held
    rank = job.choice.components(item.shape, component_bytes(item, job), largest_rank(job.runtime))
    return held + svd_memory_bytes(item.shape, rank)


def choose_ranks(
    job: ExportJob, factored: Mapping[str, Factored], free_bytes: int
) -> dict[str, int]:
    """The rank of each tensor's pair. `free_bytes` is what --bytes leaves for pairs.

    Raises BudgetError where that is too little.
    """
    items = {item.name: item for item in job.of("pair")}
    spectra = {name: factored[name].s for name in items}
    if job.choice.n_bytes is not None:
        costs = {name: component_bytes(item, job) for name, item in items.items()}
        return bytes_ranks(spectra, costs, free_bytes)
    if job.choice.energy is not None:
        return {
            name: energy_rank(s, _total(factored[name]), job.choice.energy)
            for name, s in spectra.items()
        }
    return {name: len(s) for name, s in spectra.items()}


def _total(found: Factored) -> float:
    """What the squares of all singular values would add up to; of a whitened delta, of those known."""
    return found.squared if found.source != "whitened" else sum(value**2 for value in found.s)


def chosen_pair(job: ExportJob, workspace: Workspace, item: Item, rank: int) -> tuple[Any, Any]:
    """(A r x i, B^T r x o) of a tensor in the dtype that is written."""
    number = next(n for n, each in enumerate(job.items) if each is item)
    loaded = workspace.load_tensors(f"{FACTORS}/{number:06d}.safetensors")
    dtype = dtype_of(item, job)
    return loaded["a"][:rank].to(dtype), loaded["b"][:rank].to(dtype)


def pair_error(job: ExportJob, item: Item, a: torch.Tensor, b: torch.Tensor) -> float:
    """|D - B A|^2 of what is written: A (r, i), B (o, r)."""
    return squared_error(acting_delta(item, job), a, b)


def pair_specs(
    job: ExportJob, item: Item, rank: int
) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
    """(shape of PEFT's A, shape of PEFT's B, dtype) at each place of a tensor."""
    dtype = DTYPE_NAMES[dtype_of(item, job)]
    return [(*pair_shapes(place, item.shape, rank), dtype) for place in item.places]
