"""A merge whose result is an archive: merged into a folder, compressed against the base, dropped."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from deltafold.checkpoint import open_checkpoint
from deltafold.compressing.compress import compress
from deltafold.compressing.job import budget_of
from deltafold.merging.merge import merge as merge_verb
from deltafold.merging.recipe import Recipe
from deltafold.merging.sources import open_source
from deltafold.running.record import Record, check_record_path, record_path, write_record
from deltafold.running.workspace import check_output

BUDGETS = ("file_ratio", "nominal_ratio", "n_bytes")
QUIET = ("progress", "workers", "memory_bytes", "engine")


def merge_to_archive(
    base: str | Path,
    recipe: Recipe,
    output: Path,
    options: dict[str, Any],
    settings: dict[str, Any],
) -> Record:
    """Merge into a folder beside the output, compress it, and drop it.

    `options` are those of `compress`, `settings` those of the verb `merge`. A run that ended after
    the merge goes on from there. Raises DeltafoldError.
    """
    settings = dict(settings)  # the caller's stay as they are: it writes its record too
    budget_of(options.get("method", "auto"), *map(options.get, BUDGETS))
    overwrite, record = settings.pop("overwrite", False), settings.pop("record", None)
    check_output(output, overwrite, [base, *(model.path for model in recipe.models)])
    check_record_path(record)
    if settings.get("dry_run"):
        return merge_verb(base, recipe, output, overwrite=overwrite, **settings)
    folder = output.with_name(f"{output.name}.merged")
    made = _merged_before(base, recipe, folder, settings)
    if made is None:
        for path in (folder, record_path(folder)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        made = merge_verb(base, recipe, folder, **settings)
        made["asked"] = _asked(base, recipe, settings)
        write_record(made, record_path(folder))
    common: dict[str, Any] = {name: settings[name] for name in QUIET if name in settings}
    destination = Path(record) if record else record_path(output)
    common |= {
        "overwrite": overwrite,
        "restart": settings.get("restart", False),
        "record": destination,
    }
    archived = compress(base, folder, output, **options, **common)
    made.pop("asked")
    made |= {
        "output": str(output),
        "archive": archived["totals"] | {"settings": archived["settings"]},
    }
    made["seconds"] += archived["seconds"]
    made["peak_memory_bytes"] = max(made["peak_memory_bytes"], archived["peak_memory_bytes"])
    write_record(made, destination)
    shutil.rmtree(folder)
    record_path(folder).unlink()
    return made


def _asked(base: str | Path, recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """What a merged folder is bound to."""
    candidates = [each.to_json() for each in settings.get("candidates", ())]
    with contextlib.closing(open_checkpoint(base)) as ground:
        inputs: list[object] = [ground.fingerprint()]
        for model in recipe.models:
            with contextlib.closing(open_source(model.path, ground)) as source:
                inputs.append(source.fingerprint())
    asked = {"recipe": recipe.to_json(), "candidates": candidates, "inputs": inputs,
             "seed": settings.get("seed", 0)}  # fmt: skip
    return dict(json.loads(json.dumps(asked)))


def _merged_before(
    base: str | Path, recipe: Recipe, folder: Path, settings: dict[str, Any]
) -> Record | None:
    """The record of a merge that an earlier run finished, if it is of the same inputs."""
    path = record_path(folder)
    if settings.get("restart") or not (folder.is_dir() and path.is_file()):
        return None
    found = json.loads(path.read_text())
    return found if found.get("asked") == _asked(base, recipe, settings) else None
