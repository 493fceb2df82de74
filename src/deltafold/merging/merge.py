"""`merge`: several fine-tunes of one base become one ordinary checkpoint.

Tensor by tensor: the base's and each model's are read (an archive's decoded), deltas are sparsified
and combined in fp32, the result is added to the base and rounded once. Memory holds the tensors of
one name, whatever the models' size; random choices follow from seed, tensor and model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltafold.archive import TensorDigest
from deltafold.calibration.opens import check_opens
from deltafold.checkpoint import CheckpointWriter, open_checkpoint, plan_shards, tensor_bytes
from deltafold.checkpoint.beside import is_own_index
from deltafold.checkpoint.writer import TensorSpec, put_file
from deltafold.lazy import torch
from deltafold.merging.inputs import Inputs, settle_inputs
from deltafold.merging.recipe import Recipe
from deltafold.merging.request import MergeRequest
from deltafold.merging.search import Choose, Formed
from deltafold.merging.sources import CheckpointSource, Source, open_source
from deltafold.merging.tensors import Tensors, agreement, scaled_figures
from deltafold.running.engine import Resources, Task
from deltafold.running.outputs import check_space
from deltafold.running.record import RECORD_VERSION, Record
from deltafold.running.run import Run, texts_identity
from deltafold.running.workspace import Workspace, is_written

FOLDER = "merged"


@dataclass(frozen=True)
class Wish:
    """A merge settled in words: the base, the recipe, and where several are tried, which and by what.

    With `candidates`, recipes of the same models in place of `recipe`, all are formed in one pass over
    the models; `choose` is given them (see `Formed`) and says which one is written, and what to say of
    it in the record.
    """

    base: str
    recipe: Recipe
    candidates: Sequence[Recipe] = ()
    choose: Choose | None = None

    @property
    def sources(self) -> list[str]:
        """Everything that is read."""
        return [self.base, *(model.path for model in self.recipe.models)]


def merge_models(request: MergeRequest, wish: Wish) -> Record:
    """Merge the models of a recipe, all fine-tunes of the base, into the request's output."""
    with Run("merge", request, wish.sources, checks_dry_runs=True) as run:
        ground = run.opened(open_checkpoint(wish.base))
        sources = [run.opened(open_source(m.path, ground)) for m in wish.recipe.models]
        inputs = settle_inputs(CheckpointSource(ground), sources, wish.recipe)
        content = _content(inputs, [CheckpointSource(ground), *sources], request, wish.recipe)
        if request.dry_run:
            return content
        identity = {
            "command": "merge",
            "base": ground.fingerprint(),
            "models": [source.fingerprint() for source in sources],
            "recipe": wish.recipe.to_json(),
            "candidates": [each.to_json() for each in wish.candidates],
            **request.identity(),
            **(_judged_by(request) if wish.choose is not None else {}),
        }
        workspace, recipe = run.begin(identity, inputs.total_bytes), wish.recipe
        tensors, formed = Tensors(inputs, request.seed), None
        if wish.choose is not None:
            formed = Formed(tensors, wish.candidates, workspace)
            check_space(run.output, inputs.total_bytes + formed.disk_bytes)
            formed.form(run.resources)
            chosen, content["search"] = wish.choose(formed)
            recipe = wish.candidates[chosen]
            content["recipe"] = recipe.to_json()
        plan = partial(
            plan_shards, shard_bytes=request.shard_bytes, inner=ground.inner_files, stem=ground.stem
        )
        work = TensorMerge(tensors, recipe, workspace, formed, plan)
        work.run(run.resources, ground.metadata or {"format": "pt"})
        checked = check_opens(work.folder, ground.label, ground.path)
        run.publish(FOLDER)
        return run.record(content | {"tensors": work.figures, "checked": checked})


def _content(
    inputs: Inputs, sources: Sequence[Source], request: MergeRequest, recipe: Recipe
) -> Record:
    """What is known before any work."""
    return {
        "record_version": RECORD_VERSION,
        "kind": "merge",
        "base": inputs.base.label,
        "output": str(request.output),
        "output_bytes": inputs.total_bytes,
        "recipe": recipe.to_json(),
        "settings": request.settings(),
        "models": [source.label for source in inputs.models],
        "vocabulary": {"choice": inputs.settled.choice, "rows": inputs.settled.rows},
        "notes": inputs.notes,
        "left_out": [
            {**each, "of": source.label} for source in sources for each in source.left_out
        ],
        "tensors": [],
    }


def _judged_by(request: MergeRequest) -> dict[str, Any]:
    """What the scores of candidates come from."""
    rows = [*(request.search_on or ()), *request.tasks, *request.texts]
    asked = [*map(str, rows), request.limit, request.batch_size, request.dtype]
    return {"judged by": asked, "judged on": texts_identity(rows)}


class TensorMerge:
    """The tasks of one merge, a tensor each."""

    def __init__(
        self,
        tensors: Tensors,
        recipe: Recipe,
        workspace: Workspace,
        formed: Formed | None,
        plan: Callable[[list[TensorSpec]], dict[str, list[TensorSpec]]],
    ):
        self.tensors, self.recipe, self.formed = tensors, recipe, formed
        self.inputs, self.workspace = tensors.inputs, workspace
        self.figures: list[dict[str, Any]] = []
        self.names = list(self.inputs.layout)
        self.folder = workspace.kept_folder(FOLDER)
        self.layout = plan([(n, dtype, shape) for n, (dtype, shape) in self.inputs.layout.items()])

    def run(self, resources: Resources, metadata: dict[str, str]) -> None:
        """Merge every tensor that is not done yet, and write the files beside the weights."""
        writer = CheckpointWriter(self.folder, self.layout, metadata)
        tasks = [
            Task(
                name,
                partial(self._one, name, number, writer),
                memory_bytes=self.tensors.memory_bytes(name, self.recipe),
                work=float(self.tensors.elements(name)),
            )
            for number, name in enumerate(self.names)
            if not self._is_done(name, number, writer)
        ]
        try:
            resources.run("merge", tasks)
            writer.finish()
        finally:
            writer.close()
        self.figures = self.rows()
        for name, data in sorted(self.inputs.files.items()):
            if not is_own_index(name):
                put_file(self.folder, name, data)

    def rows(self) -> list[dict[str, Any]]:
        """What was measured of each tensor, in the base's order."""
        return [self.workspace.load_json(_done(n))["row"] for n in range(len(self.names))]

    def _is_done(self, name: str, number: int, writer: CheckpointWriter) -> bool:
        """Whether an earlier run has written a tensor, and it lies there as it was."""
        if not self.workspace.has(_done(number)):
            return False
        noted = self.workspace.load_json(_done(number))["checksum"]
        dtype, shape = self.inputs.layout[name]
        return is_written(writer, name, TensorDigest(dtype, shape), noted)

    def _one(self, name: str, number: int, writer: CheckpointWriter) -> None:
        row = self.tensors.head(name)
        if not self.tensors.is_float(name):
            whole = self.inputs.base.tensor(name)
        elif self.formed is not None:
            whole, figures = self.formed.finished(name, self.recipe)
            row |= figures
        else:
            reading = self.tensors.read(name, self.recipe)
            row |= agreement(reading.deltas)
            merged, figures = self.tensors.merged(name, reading, self.recipe, last=True)
            scale = self.recipe.scale_at(name, self.inputs.n_blocks)
            row |= scaled_figures(figures, scale)
            whole = self.tensors.added(name, reading.ground, merged, scale)
        writer.write(name, whole)
        self.workspace.save_json(
            _done(number), {"row": row, "checksum": self._checksum(name, whole)}
        )

    def _checksum(self, name: str, whole: torch.Tensor) -> str:
        digest = TensorDigest(*self.inputs.layout[name])
        digest.update(tensor_bytes(whole))
        return digest.checksum()


def _done(number: int) -> str:
    return f"done/{number:06d}.json"
