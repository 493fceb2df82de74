"""One cell of a benchmark: a method, a size and a seed; compressed and restored as a user would.

The command line in a process of its own gives true seconds and peak memory. Where only the archive
matters, `compress_here` makes it in this process, without the seconds that a start costs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deltafold
from deltafold.codecs import get, names
from deltafold.errors import DeltafoldError
from deltafold.running.record import Record


class CommandFailedError(DeltafoldError):
    """A deltafold command ended with an error; the text is what it printed."""


@dataclass(frozen=True)
class Cell:
    """What is asked of `compress`. An exact method has no ratio."""

    method: str
    file_ratio: float | None = None
    seed: int = 0
    calibration: Path | None = None

    @property
    def name(self) -> str:
        """`dare-32-1`, a name for files."""
        ratio = "exact" if self.file_ratio is None else f"{self.file_ratio:g}"
        return f"{self.method}-{ratio}-{self.seed}"


def methods(lossy: bool | None = None) -> list[str]:
    """Codecs that can be asked for by name; all, or only those that are lossy or exact."""
    return [m for m in names() if get(m).method and lossy in (None, get(m).lossy)]


def run(arguments: list[str], quiet: bool = False) -> float:
    """Seconds of one deltafold command, start of the process included.

    Raises CommandFailedError; with `quiet`, its text is what the command said.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "deltafold", *arguments]
    done = subprocess.run(command, check=False, capture_output=quiet, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        said = (done.stderr or "").strip()
        raise CommandFailedError(said or f"deltafold {' '.join(arguments)} failed")
    return seconds


def calibrated(cell: Cell) -> tuple[list[str], dict[str, Any]]:
    """How calibration text is given: options of the command line, arguments of the verb."""
    if cell.calibration is None:
        return [], {}
    return ["--calibration", str(cell.calibration)], {"calibration": cell.calibration}


def compress(cell: Cell, base: Path, finetuned: Path, archive: Path, quiet: bool = False) -> Record:
    """Compress by the command line; sizes, settings, seconds and peak memory."""
    arguments = ["compress", str(base), str(finetuned), "-o", str(archive), "-m", cell.method]
    if cell.file_ratio is not None:
        arguments += ["--file-ratio", f"{cell.file_ratio:g}"]
    seconds = run([*arguments, "--seed", str(cell.seed), *calibrated(cell)[0]], quiet)
    record = json.loads(Path(f"{archive}.record.json").read_text())
    return sizes(record) | {
        "compress_seconds": seconds,
        "peak_memory_bytes": record["peak_memory_bytes"],
    }


def compress_here(cell: Cell, base: Path, finetuned: Path, archive: Path) -> Record:
    """Compress in this process; sizes and settings. Raises DeltafoldError."""
    record = deltafold.compress(
        base,
        finetuned,
        archive,
        cell.method,
        file_ratio=cell.file_ratio,
        seed=cell.seed,
        **calibrated(cell)[1],
    )
    return sizes(record)


def sizes(record: Record) -> Record:
    """From the record of a `compress` run what a row of a benchmark says of the archive."""
    totals = ("file_ratio", "nominal_ratio", "archive_bytes")
    return {key: record["totals"][key] for key in totals} | {"settings": record["settings"]}


def restore(archive: Path, base: Path, restored: Path, quiet: bool = False) -> Record:
    """Restore by the command line; seconds and peak memory."""
    seconds = run(["restore", str(archive), "--base", str(base), "-o", str(restored)], quiet)
    record = json.loads(Path(f"{restored}.record.json").read_text())
    return {
        "restore_seconds": seconds,
        "restore_peak_memory_bytes": record["peak_memory_bytes"],
    }
