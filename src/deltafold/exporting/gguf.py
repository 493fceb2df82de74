"""The last step of `export --to gguf-lora`: the pairs that were chosen, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltafold.checkpoint.writer import guard_storage
from deltafold.exporting.gguf_files import LoraFile
from deltafold.exporting.job import ExportJob, Item
from deltafold.exporting.passes import chosen_pair
from deltafold.running.workspace import Workspace

FILE = "adapter.gguf"


def write_gguf_lora(
    job: ExportJob, workspace: Workspace, items: Sequence[Item], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Write the file into the workspace; what the record and the last rename need to know."""
    path = workspace.folder / FILE
    path.unlink(missing_ok=True)

    def write() -> None:
        file = LoraFile(path, job.layout, float(max(ranks[item.name] for item in items)))
        for item in items:
            a, b = chosen_pair(job, workspace, item, ranks[item.name])
            for place in item.places:
                file.add(place, a, b)
        file.finish()

    guard_storage(path, write)
    return {"finished": FILE}
