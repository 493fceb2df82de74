"""Adapters of archives, made once and kept: what `load` and `serve` give to engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltafold.archive import MANIFEST_FILE, Archive
from deltafold.checkpoint import cache_root, open_checkpoint
from deltafold.checkpoint.kinds import ADAPTER_CONFIG
from deltafold.checkpoint.noted import save_note, take_up_folder
from deltafold.errors import UsageError
from deltafold.exporting.export import export
from deltafold.running.engine import Progress
from deltafold.running.locks import held
from deltafold.version import __version__

VERSION = 1  # of what export writes: another number makes kept adapters forgotten


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter on disk. `largest_rank` is None for one that deltafold did not make."""

    name: str
    folder: Path
    largest_rank: int | None = None
    relative_error: float | None = None


def adapters_folder() -> Path:
    """`adapters` in DELTAFOLD_CACHE or in `~/.cache/deltafold`."""
    return cache_root() / "adapters"


def check_names(deltas: Mapping[str, object]) -> None:
    """Names of fine-tunes must be something that engines can take. Raises UsageError."""
    if not deltas:
        raise UsageError("No fine-tune is given; name at least one, like math=math.delta.")
    for name in deltas:
        if not name or name == "__base__" or not name.replace("-", "_").isidentifier():
            raise UsageError(
                f"{name!r} cannot be the name of a fine-tune; use letters, digits, - and _."
            )


def find_adapter(
    name: str,
    delta: str | Path,
    base: str | Path,
    *,
    runtime: str = "peft",
    rank: int | None = None,
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """The adapter of an archive, exported unless it is found in the cache; or an adapter as it is.

    The key is what the archive holds, the base's files, the settings. Raises DeltafoldError.
    """
    folder = Path(delta).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return Adapter(name, folder)
    if not (folder / MANIFEST_FILE).is_file():
        raise UsageError(f"{delta} is neither an archive nor an adapter; check the path.")
    from deltafold.calibration.kept import key_of

    with Archive(folder) as archive, open_checkpoint(base) as checkpoint:
        key = key_of([
            VERSION, __version__, archive.identity, checkpoint.fingerprint(), runtime, rank,
        ])  # fmt: skip
    kept = adapters_folder() / key
    with held(kept.with_name(f"{key}.making")):
        if (found := take_up_folder(kept)) is None:
            record = export(
                folder, kept, base=base, rank=rank, runtime=runtime, workers=workers,
                memory_bytes=memory_bytes, progress=progress, restart=True,
            )  # fmt: skip
            found = [int(record["largest_rank"]), float(record["relative_error"])]
            save_note(kept, found)
    return Adapter(name, kept, *found)
