"""What is given as a checkpoint and is something else: one sentence that says what it is."""

from __future__ import annotations

from pathlib import Path

from deltafold.checkpoint.contents import ARCHIVE_FILE, INDEX_FILE, SINGLE_FILE
from deltafold.checkpoint.json_files import read_object
from deltafold.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(path: Path) -> Path | None:
    """The folder of the adapter that `path` is (PEFT's: config and weights), or None.

    A folder that has the weights of a whole model beside the adapter's is a model.
    """
    folder = path.parent if path.name == ADAPTER_FILE else path
    if not (folder / ADAPTER_CONFIG).is_file() or any(
        (folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)
    ):
        return None
    weights = {file.name for file in folder.glob("*.safetensors")}
    return folder if weights <= {ADAPTER_FILE} else None


def adapter_kind(folder: Path) -> str:
    """`LORA` and the like, as PEFT's config says; empty if it cannot be read."""
    try:
        return str((read_object(folder / ADAPTER_CONFIG) or {}).get("peft_type", ""))
    except CheckpointError:
        return ""


def refuse_archive(path: Path, label: str) -> None:
    """Raises CheckpointError for an archive."""
    if (path / ARCHIVE_FILE).is_file():
        raise CheckpointError(
            f"{label} is an archive, not a checkpoint; restore it first (deltafold restore {label} "
            "--base BASE -o FOLDER) and give that folder."
        )


def refuse_other_kinds(path: Path, label: str) -> None:
    """Raises CheckpointError for an archive and for an adapter."""
    refuse_archive(path, label)
    if (folder := adapter_folder(path)) is not None:
        kind = "a LoRA adapter" if adapter_kind(folder) == "LORA" else "an adapter"
        raise CheckpointError(
            f"{label} is {kind}, not a whole model; give it as the fine-tune to compress and "
            "restore that archive, or merge it into its base with PEFT (merge_and_unload), and "
            "give the folder."
        )
