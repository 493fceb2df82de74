"""`merge`: several fine-tunes of one base become one ordinary checkpoint.

Tensor by tensor: the base's and each model's are read (an archive's decoded), deltas are sparsified
and combined in fp32, the result is added to the base and rounded once. Memory holds the tensors of
one name, whatever the models' size; random choices follow from seed, tensor and model alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltafold.checkpoint import CheckpointWriter, open_checkpoint, plan_shards
from deltafold.checkpoint.writer import guard_storage
from deltafold.errors import UsageError
from deltafold.merging.inputs import Inputs, settle_inputs
from deltafold.merging.recipe import Recipe
from deltafold.merging.search import Choose, Formed
from deltafold.merging.sources import CheckpointSource, open_source
from deltafold.merging.tensors import Tensors, agreement, scaled_figures
from deltafold.running.cluster import check_engine, open_engine
from deltafold.running.engine import Progress, Resources, Task
from deltafold.running.record import (
    RECORD_VERSION,
    Meter,
    Record,
    check_record_path,
    machine,
    record_path,
    write_record,
)
from deltafold.running.stored import storable
from deltafold.running.workspace import Workspace, check_output, check_space

SHARD_BYTES = 5_000_000_000


@storable
def merge(
    base: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    candidates: Sequence[Recipe] = (),
    choose: Choose | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    workers: int | None = None,
    memory_bytes: int | None = None,
    engine: str = "threads",
    progress: Progress | None = None,
    record: str | Path | None = None,
) -> Record:
    """Merge the models of a recipe, all fine-tunes of `base`, into the folder `output`.

    Models are checkpoints (folders, files, hub ids) or archives. With `candidates`, recipes of the
    same models in place of `recipe`, all are formed in one pass over the models; `choose` is given
    them (see `Formed`) and says which one is written, and what to say of it in the record.
    `dry_run`: read headers and tokenizers, settle what differs, write nothing. `engine`: `threads`, or
    `ray` for a cluster; it changes no byte.

    Returns the record: norms, cosines and agreement of the deltas, tensor by tensor. Raises
    MismatchError where the models do not fit the base; nothing is left under `output` then.
    """
    out = Path(output)
    check_output(out, overwrite, [base, *(model.path for model in recipe.models)])
    check_record_path(record)
    check_engine(engine)
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {seed}.")
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter())
        ground = stack.enter_context(contextlib.closing(open_checkpoint(base)))
        sources = [
            stack.enter_context(contextlib.closing(open_source(model.path, ground)))
            for model in recipe.models
        ]
        inputs = settle_inputs(CheckpointSource(ground), sources, recipe)
        result = _result(inputs, out, recipe, seed)
        if dry_run:
            return result
        check_space(out, inputs.total_bytes)
        identity = {
            "command": "merge",
            "base": ground.fingerprint(),
            "models": [source.fingerprint() for source in sources],
            "recipe": recipe.to_json(),
            "candidates": [each.to_json() for each in candidates],
            "seed": seed,
            "shards": shard_bytes,
        }
        workspace = stack.enter_context(Workspace(out, identity, restart))
        runner = stack.enter_context(open_engine(engine, workers, memory_bytes))
        resources = Resources(workers, memory_bytes, progress, runner)
        formed = None
        if choose is not None:
            formed = Formed(Tensors(inputs, seed), candidates, workspace)
            check_space(out, inputs.total_bytes + formed.disk_bytes)
            formed.form(resources)
            chosen, result["search"] = choose(formed)
            recipe = candidates[chosen]
            result["recipe"] = recipe.to_json()
        work = _Merge(Tensors(inputs, seed), recipe, workspace, shard_bytes, formed)
        work.run(resources, ground.metadata or {"format": "pt"})
        result["tensors"] = work.rows()
        workspace.publish("merged", overwrite)
    result |= {
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "machine": machine(),
    }
    if runner:
        result["engine"] = runner.to_record()
    write_record(result, Path(record) if record else record_path(out))
    return result


def _result(inputs: Inputs, out: Path, recipe: Recipe, seed: int) -> Record:
    """What is known before any work."""
    return {
        "record_version": RECORD_VERSION,
        "kind": "merge",
        "base": inputs.base.label,
        "output": str(out),
        "output_bytes": inputs.total_bytes,
        "recipe": recipe.to_json(),
        "settings": {"seed": seed},
        "models": [source.label for source in inputs.models],
        "vocabulary": {"choice": inputs.settled.choice, "rows": inputs.settled.rows},
        "notes": inputs.notes,
        "tensors": [],
    }


class _Merge:
    """One run: its inputs, and the tasks."""

    def __init__(
        self,
        tensors: Tensors,
        recipe: Recipe,
        workspace: Workspace,
        shard_bytes: int,
        formed: Formed | None,
    ):
        self.tensors, self.recipe, self.formed = tensors, recipe, formed
        self.inputs, self.workspace = tensors.inputs, workspace
        self.names = list(self.inputs.layout)
        self.folder = workspace.folder / "merged"
        guard_storage(self.folder, lambda: self.folder.mkdir(exist_ok=True))
        self.layout = plan_shards(
            [(n, dtype, shape) for n, (dtype, shape) in self.inputs.layout.items()], shard_bytes
        )

    def run(self, resources: Resources, metadata: dict[str, str]) -> None:
        """Merge every tensor that is not done yet, and write the files beside the weights."""
        writer = CheckpointWriter(self.folder, self.layout, metadata)
        tasks = [
            Task(
                name,
                lambda n=name, k=number: self._one(n, k, writer),  # type: ignore[misc]
                memory_bytes=self.tensors.memory_bytes(name, self.recipe),
                work=float(self.tensors.elements(name)),
            )
            for number, name in enumerate(self.names)
            if not self.workspace.has(_done(number))
        ]
        try:
            resources.run("merge", tasks)
            writer.finish()
        finally:
            writer.close()
        for name, data in sorted(self.inputs.files.items()):
            path = self.folder / name
            guard_storage(path, lambda p=path, d=data: p.write_bytes(d))  # type: ignore[misc]

    def rows(self) -> list[dict[str, Any]]:
        """What was measured of each tensor, in the base's order."""
        return [self.workspace.load_json(_done(n)) for n in range(len(self.names))]

    def _one(self, name: str, number: int, writer: CheckpointWriter) -> None:
        row = self.tensors.head(name)
        if not self.tensors.is_float(name):
            writer.write(name, self.inputs.base.tensor(name))
        elif self.formed is not None:
            whole, figures = self.formed.finished(name, self.recipe)
            writer.write(name, whole)
            row |= figures
        else:
            reading = self.tensors.read(name, self.recipe)
            row |= agreement(reading.deltas)
            merged, figures = self.tensors.merged(name, reading, self.recipe, last=True)
            scale = self.recipe.scale_at(name, self.inputs.n_blocks)
            row |= scaled_figures(figures, scale)
            writer.write(name, self.tensors.added(name, reading.ground, merged, scale))
        self.workspace.save_json(_done(number), row)


def _done(number: int) -> str:
    return f"done/{number:06d}.json"
