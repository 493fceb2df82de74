"""What is given as a checkpoint and is something else, told by a sentence that is true of it."""

from __future__ import annotations

import json
from pathlib import Path

from deltafold.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_ARCHIVE_FILE = "delta.json"
_WHOLE = ("model.safetensors", "model.safetensors.index.json")


def adapter_folder(path: Path) -> Path | None:
    """The folder of the adapter that `path` is (PEFT's: config and weights), or None.

    A folder that has the weights of a whole model beside the adapter's is a model.
    """
    folder = path.parent if path.name == ADAPTER_FILE else path
    if not (folder / ADAPTER_CONFIG).is_file() or any((folder / n).is_file() for n in _WHOLE):
        return None
    weights = {file.name for file in folder.glob("*.safetensors")}
    return folder if weights <= {ADAPTER_FILE} else None


def adapter_kind(folder: Path) -> str:
    """`LORA` and the like, as PEFT's config says; empty if it cannot be read."""
    try:
        return str(json.loads((folder / ADAPTER_CONFIG).read_text())["peft_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def refuse_other_kinds(path: Path, label: str) -> None:
    """Raises CheckpointError for an archive and for an adapter."""
    if (path / _ARCHIVE_FILE).is_file():
        raise CheckpointError(
            f"{label} is an archive, not a checkpoint; restore it first (deltafold restore {label} "
            "--base BASE -o FOLDER) and give that folder."
        )
    if (folder := adapter_folder(path)) is not None:
        kind = "a LoRA adapter" if adapter_kind(folder) == "LORA" else "an adapter"
        raise CheckpointError(
            f"{label} is {kind}, not a whole model; give it as the fine-tune to compress and "
            "restore that archive, or merge it into its base with PEFT (merge_and_unload), and "
            "give the folder."
        )
