"""Records: what a run did, measured, as JSON. Tables and figures are drawn from them, never typed.

A record lies beside what it speaks of (`math.delta` and `math.delta.record.json`), not inside: it
holds times, which differ from run to run, while an archive of the same inputs has the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from deltafold.checkpoint import sealed
from deltafold.errors import DeltafoldError, StorageError, StorageWarning, UsageError
from deltafold.foreign import unread
from deltafold.running import devices
from deltafold.running.memory import total_memory_bytes
from deltafold.version import __version__

RECORD_VERSION = 1
Record = dict[str, Any]

COMMAND: ContextVar[str | None] = ContextVar("command", default=None)
"""The command line that this process was started with; None where Python called a verb."""


def is_main_process() -> bool:
    """True for the one that speaks and writes, of several that `torchrun` and the like have started."""
    return os.environ.get("RANK", "0") == "0"


def record_path(output: Path) -> Path:
    """Where the record of an output lies: `NAME.record.json` beside it."""
    return output.with_name(output.name + ".record.json")


def check_record_path(path: str | Path | None) -> None:
    """Refuse, before work begins, a place where no record can be written."""
    if path is None:
        return
    above = [folder for folder in Path(path).absolute().parents if folder.exists()]
    if Path(path).is_dir() or not above[0].is_dir():
        raise UsageError(f"The record cannot go to {path}: give a file in a folder.")


def write_record(record: Record, path: Path) -> None:
    """Write by rename, so that a reader never sees half a record. Raises StorageError.

    Adds the command line, where the run has one, to the record.
    """
    if (command := COMMAND.get()) is not None:
        record.setdefault("command", command)
    if (found := devices.to_record()) is not None:
        record["device"] = found
    text = as_json(record, indent=1) + "\n"
    try:
        sealed.put(path, [text.encode()])
    except StorageError as error:
        reason = getattr(error.__cause__, "strerror", error)
        raise StorageError(
            f"The record {path} cannot be written ({reason}); give another path for it."
        ) from error


def as_json(value: Any, indent: int | None = None) -> str:
    """A record as JSON, which has neither infinity nor NaN: what was measured so is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_afterwards(record: Record, path: Path, output: Path) -> None:
    """Write the record of an output that is in its place. Where that fails, it is a warning."""
    try:
        write_record(record, path)
    except StorageError as error:
        warnings.warn(
            f"{output} is whole and in its place, but: {error}", StorageWarning, stacklevel=3
        )


def read_record(path: Path) -> Record:
    """Read a record; `path` may also be the output that it lies beside, or a folder holding one."""
    candidates = [path, record_path(path), path / "record.json"]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise DeltafoldError(f"{path} has no record; give a record.json or the output of a run.")
    try:
        record = json.loads(found.read_text())
        if record["record_version"] > RECORD_VERSION:
            raise DeltafoldError(f"{found} was written by a newer deltafold; upgrade to read it.")
    except OSError as error:
        raise unread(error, found, DeltafoldError) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DeltafoldError(
            f"{found} is not a record ({error!r}); run the command again."
        ) from None
    return dict(record)


def machine() -> dict[str, Any]:
    """The machine and versions that a measurement belongs to, and the device of its heavy steps."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "deltafold": __version__,
        "python": platform.python_version(),
        "torch": installed("torch"),
        "transformers": installed("transformers"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory_bytes(),
        "device": devices.label(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
