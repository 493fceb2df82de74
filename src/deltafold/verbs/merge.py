"""`merge`: several fine-tunes of one base become one ordinary checkpoint.

Tensor by tensor: the base's and each model's are read (an archive's decoded), deltas are sparsified
and combined in fp32, the result is added to the base and rounded once. Memory holds the tensors of
one name, whatever the models' size; random choices follow from seed, tensor and model alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltafold.checkpoint import DTYPES, Checkpoint, CheckpointWriter, open_checkpoint, plan_shards
from deltafold.checkpoint.writer import guard_storage
from deltafold.coding.counter import derive_key
from deltafold.engine import Progress, Task, run_tasks
from deltafold.errors import MismatchError, NonFiniteError, UsageError
from deltafold.merging import CONSENSUS, SPARSIFIERS
from deltafold.merging.consensus import WHOLE_WEIGHTS
from deltafold.merging.recipe import Recipe
from deltafold.names import block_of, role_of
from deltafold.record import (
    RECORD_VERSION,
    Meter,
    Record,
    check_record_path,
    machine,
    record_path,
    write_record,
)
from deltafold.verbs.sources import Source, open_source
from deltafold.verbs.workspace import Workspace, check_output, check_space

SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 18  # entries of each model that are compared at a time


def merge(
    base: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
    record: str | Path | None = None,
) -> Record:
    """Merge the models of a recipe, all fine-tunes of `base`, into the folder `output`.

    Models are checkpoints (folders, files, hub ids) or archives. Config and tokenizer are the
    base's. Returns the record: norms, cosines and agreement of the deltas, tensor by tensor. Raises
    MismatchError where the models do not fit the base; nothing is left under `output` then.
    """
    out = Path(output)
    check_output(out, overwrite, [base, *(model.path for model in recipe.models)])
    check_record_path(record)
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {seed}.")
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter())
        ground = stack.enter_context(contextlib.closing(open_checkpoint(base)))
        sources = [
            stack.enter_context(contextlib.closing(open_source(model.path, ground)))
            for model in recipe.models
        ]
        check_models(ground, sources)
        check_space(out, ground.total_bytes)
        identity = {
            "command": "merge",
            "base": ground.fingerprint(),
            "models": [source.fingerprint() for source in sources],
            "recipe": recipe.to_json(),
            "seed": seed,
            "shards": shard_bytes,
        }
        workspace = stack.enter_context(Workspace(out, identity, restart))
        work = _Merge(ground, sources, recipe, seed, workspace, shard_bytes)
        work.run(workers, memory_bytes, progress)
        rows = work.rows()
        workspace.publish("merged", overwrite)
    result = {
        "record_version": RECORD_VERSION,
        "kind": "merge",
        "base": ground.label,
        "output": str(out),
        "recipe": recipe.to_json(),
        "settings": {"seed": seed},
        "models": [source.label for source in sources],
        "tensors": rows,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "machine": machine(),
    }
    write_record(result, Path(record) if record else record_path(out))
    return result


def check_models(base: Checkpoint, sources: Sequence[Source]) -> None:
    """Every model must have the base's tensors in the base's shapes. Raises MismatchError by name."""
    for source in sources:
        lacking = [name for name in base.tensors if name not in source.headers]
        extra = [name for name in source.headers if name not in base.tensors]
        if lacking or extra:
            name, does = (lacking[0], "lacks") if lacking else (extra[0], "has")
            other = "has" if lacking else "lacks"
            raise MismatchError(
                f"{source.label} {does} the tensor {name}, which {base.label} {other}; merge "
                "fine-tunes of one base, with heads tied or untied alike."
            )
        for name, (dtype, shape) in source.headers.items():
            info = base.tensors[name]
            if tuple(shape) != tuple(info.shape):
                raise MismatchError(
                    f"{name} is {list(shape)} in {source.label} and {list(info.shape)} in "
                    f"{base.label}; merge fine-tunes with the vocabulary of their base."
                )
            if DTYPES[dtype].is_floating_point != DTYPES[info.dtype].is_floating_point:
                raise MismatchError(
                    f"{name} is {dtype} in {source.label} and {info.dtype} in {base.label}; give "
                    "both unquantised."
                )


class _Merge:
    """One run: its inputs, and the tasks."""

    def __init__(
        self,
        base: Checkpoint,
        sources: Sequence[Source],
        recipe: Recipe,
        seed: int,
        workspace: Workspace,
        shard_bytes: int,
    ):
        self.base, self.sources, self.recipe, self.seed = base, sources, recipe, seed
        self.workspace = workspace
        self.names = list(base.tensors)
        blocks = [block for name in self.names if (block := block_of(name)) is not None]
        self.n_blocks = max(blocks, default=0) + 1
        self.folder = workspace.folder / "merged"
        guard_storage(self.folder, lambda: self.folder.mkdir(exist_ok=True))
        specs = [(n, info.dtype, tuple(info.shape)) for n, info in base.tensors.items()]
        layout = plan_shards(specs, shard_bytes)
        self.writer = CheckpointWriter(self.folder, layout, base.metadata or {"format": "pt"})

    def run(self, workers: int | None, memory_bytes: int | None, progress: Progress | None) -> None:
        """Merge every tensor that is not done yet, and write the files beside the weights."""
        tasks = [
            Task(
                name,
                lambda n=name, k=number: self._one(n, k),  # type: ignore[misc]
                memory_bytes=4 * self._elements(name) * (len(self.sources) + 4),
                work=float(self._elements(name)),
            )
            for number, name in enumerate(self.names)
            if not self.workspace.has(_done(number))
        ]
        try:
            run_tasks("merge", tasks, workers, memory_bytes, progress)
            self.writer.finish()
        finally:
            self.writer.close()
        for file in self.base.side_files:
            data = file.read_bytes()
            path = self.folder / file.name
            guard_storage(path, lambda p=path, d=data: p.write_bytes(d))  # type: ignore[misc]

    def rows(self) -> list[dict[str, Any]]:
        """What was measured of each tensor, in the base's order."""
        return [self.workspace.load_json(_done(n)) for n in range(len(self.names))]

    def _elements(self, name: str) -> int:
        return math.prod(self.base.tensors[name].shape)

    def _one(self, name: str, number: int) -> None:
        whole = self.base.tensor(name)
        row: dict[str, Any] = {"name": name, "role": role_of(name), "block": block_of(name)}
        if whole.dtype.is_floating_point:
            ground = whole.float()
            deltas = [self._delta(source, name, ground) for source in self.sources]
            row |= agreement(deltas)
            merged = self._combined(name, ground, deltas)
            row["norm"] = float(torch.linalg.vector_norm(merged, dtype=torch.float64))
            whole = ground.add_(merged).to(whole.dtype)
        self.writer.write(name, whole)
        self.workspace.save_json(_done(number), row)

    def _delta(self, source: Source, name: str, ground: torch.Tensor) -> torch.Tensor:
        delta = source.tensor(name).float().sub_(ground)
        if not delta.isfinite().all():
            raise NonFiniteError(f"{name} of {source.label} holds NaN or infinite values.")
        return delta

    def _combined(
        self, name: str, ground: torch.Tensor, deltas: list[torch.Tensor]
    ) -> torch.Tensor:
        """The merged delta."""
        recipe, (sparsifier, consensus) = self.recipe, self.recipe.rules
        numbers = recipe.all_numbers()
        weights = [recipe.weight_at(model, name, self.n_blocks) for model in recipe.models]
        for n, model in enumerate(recipe.models):
            density = recipe.density_at(model, name, self.n_blocks)
            key = derive_key(self.seed, name, f"merge {n}")
            deltas[n] = SPARSIFIERS[sparsifier](deltas[n], density, key, numbers)
        if consensus in WHOLE_WEIGHTS:
            merged = CONSENSUS[consensus]([d + ground for d in deltas], weights, numbers) - ground
        else:
            merged = CONSENSUS[consensus](deltas, weights, numbers)
        return merged.mul_(recipe.scale_at(name, self.n_blocks))


def agreement(deltas: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Norms of deltas, their cosines (pairs in order), and the share of entries agreed in sign.

    The share is over entries that at least two models change; None where there are none.
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
    }


def _done(number: int) -> str:
    return f"done/{number:06d}.json"
