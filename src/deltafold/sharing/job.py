"""What a `share` run is about: the model's structure and the plan, from its config alone."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from deltafold.blocks.structure import Structure, read_structure
from deltafold.calibration.building import build, find_blocks
from deltafold.checkpoint import local_folder
from deltafold.composed.load import is_shared
from deltafold.errors import CheckpointError, MismatchError
from deltafold.running.record import Record
from deltafold.sharing.methods.plan import make_plan
from deltafold.sharing.record import plan_record
from deltafold.sharing.request import ShareRequest


def structure_of(source: str | Path) -> Structure:
    """The structure of a folder, a hub id or a config.json. Reads no weights; none need be there.

    Raises CheckpointError, MismatchError.
    """
    folder = local_folder(source)
    if folder.is_file():
        if folder.suffix != ".json":
            raise CheckpointError(f"{source} is no config; give a folder or its config.json.")
        with tempfile.TemporaryDirectory() as name:
            shutil.copy(folder, Path(name) / "config.json")
            return _structure(Path(name), str(source))
    if is_shared(folder):
        raise MismatchError(
            f"{source} is shared or factored already; start from the model that it was made of."
        )
    return _structure(folder, str(source))


def _structure(folder: Path, label: str) -> Structure:
    model = build(folder)
    blocks, names = find_blocks(model, folder)
    return read_structure(model, blocks, names, label)


def plan_sharing(request: ShareRequest) -> Record:
    """What `share` would do, with exact counts, from the config alone. Raises DeltafoldError.

    >>> plan_sharing(ShareRequest("phi-3/config.json", "out", shared=13, rank=100))  # doctest: +SKIP
    """
    return plan_record(make_plan(structure_of(request.model), request))
