"""From a draft to a folder that is known to be it: its config found, written, opened and run."""

from __future__ import annotations

from pathlib import Path

from deltafold.calibration.opens import check_opens
from deltafold.checkpoint import Checkpoint
from deltafold.errors import MismatchError
from deltafold.folding.check import check_computes
from deltafold.folding.config import folded_config
from deltafold.folding.methods.draft import Draft
from deltafold.folding.write import write_draft
from deltafold.running.engine import Resources
from deltafold.running.record import Record


def write_checked(
    draft: Draft,
    checkpoint: Checkpoint,
    folder: Path,
    scratch: Path,
    shard_bytes: int,
    resources: Resources,
) -> Record:
    """Write the draft; the record's row of what was checked. `scratch` holds what is tried.

    Raises MismatchError where no folder can be what the draft is, CheckpointError where it does not
    open, NonFiniteError, StorageError.
    """
    found = folded_config(checkpoint, draft.numbers, scratch)
    write_draft(draft, checkpoint, found, folder, shard_bytes, resources)
    opened = check_opens(folder, checkpoint.label, checkpoint.path)
    not_run = found.unchecked or check_computes(draft, checkpoint, folder, scratch, found.grown)
    if not_run and found.grown:
        raise MismatchError(
            f"{min(found.grown)} of {checkpoint.label} has a part for each block, and it could not "
            f"be checked that these lie as they seem to ({not_run.rstrip('.')}); fold another model."
        )
    return opened | {
        "blocks_compared": found.unchecked is None,
        "run": not_run is None,
        "why_not_run": not_run,
    }
