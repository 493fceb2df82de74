"""A merge whose result is an archive: merged into a folder, compressed against the base, dropped."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from deltafold.checkpoint import open_checkpoint
from deltafold.checkpoint.noted import save_note, take_up_folder
from deltafold.compressing.compress import archive_of
from deltafold.compressing.job import budget_of
from deltafold.compressing.request import CompressRequest
from deltafold.merging.merge import Wish, merge_models
from deltafold.merging.request import MergeRequest
from deltafold.merging.sources import open_source
from deltafold.running.folders import WorkFolder
from deltafold.running.outputs import check_output
from deltafold.running.record import Record, check_record_path, record_path, write_afterwards
from deltafold.running.request import options_of


def merge_to_archive(request: MergeRequest, wish: Wish) -> Record:
    """Merge into a folder beside the output, compress it, and drop it.

    A run that ended after the merge goes on from there. Raises DeltafoldError.
    """
    budget_of(request.archive_method, *request.budget)
    output = Path(request.output)
    check_output(output, request.overwrite, wish.sources)
    check_record_path(request.record)
    if request.dry_run:
        return merge_models(request, wish)
    with WorkFolder(output, "merging") as work:
        folder = work.folder / "merged"
        asked = _asked(request, wish)
        found = None if request.restart else take_up_folder(folder)
        if found is None or found["asked"] != asked:
            merging = request.but(output=folder, overwrite=folder.exists(), record=None)
            found = {"asked": asked, "made": merge_models(merging, wish)}
            save_note(folder, found)
        work.keeps = True
        made: Record = found["made"]
        destination = Path(request.record) if request.record else record_path(output)
        archived = archive_of(_compressing(request, wish, folder, destination))
        made |= {
            "output": str(output),
            "archive": archived["totals"] | {"settings": archived["settings"]},
        }
        made["seconds"] += archived["seconds"]
        made["peak_memory_bytes"] = max(made["peak_memory_bytes"], archived["peak_memory_bytes"])
        write_afterwards(made, destination, output)
        work.finished()
    return made


def _compressing(
    request: MergeRequest, wish: Wish, folder: Path, destination: Path
) -> CompressRequest:
    """What `compress` is asked: the merged folder against the base."""
    given = dict(request.archive_settings)
    known = {name: given.pop(name) for name in [*given] if name in options_of(CompressRequest)}
    return CompressRequest(
        wish.base, folder, request.output, request.archive_method,
        file_ratio=request.file_ratio, nominal_ratio=request.nominal_ratio, n_bytes=request.n_bytes,
        calibration=request.calibration, overwrite=request.overwrite, restart=request.restart,
        record=destination, workers=request.workers, memory_bytes=request.memory_bytes,
        engine=request.engine, progress=request.progress, method_settings=given,
    ).but(**known)  # fmt: skip


def _asked(request: MergeRequest, wish: Wish) -> dict[str, Any]:
    """What a merged folder is bound to."""
    with contextlib.closing(open_checkpoint(wish.base)) as ground:
        inputs: list[object] = [ground.fingerprint()]
        for model in wish.recipe.models:
            with contextlib.closing(open_source(model.path, ground)) as source:
                inputs.append(source.fingerprint())
    asked = {
        "recipe": wish.recipe.to_json(),
        "candidates": [each.to_json() for each in wish.candidates],
        "inputs": inputs,
        "seed": request.seed,
    }
    return dict(json.loads(json.dumps(asked)))
