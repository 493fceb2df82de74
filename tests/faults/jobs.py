"""The commands that the campaign disturbs, and what each amounts to when nothing disturbs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints import tree_hashes
from command_line import Told, deltafold
from faults.models import Models
from safetensors.torch import save

LITTLE = ("--samples", 4, "--max-tokens", 24)
Arguments = tuple[object, ...]


@dataclass(frozen=True)
class Job:
    """One command. `reads` are the models it is given; `weight` is how often it is taken.

    `resumes` says that it leaves work to go on with; one that `writes` nothing only answers.
    """

    name: str
    arguments: Callable[[Models, Path], Arguments]
    reads: tuple[str, ...]
    weight: int = 4
    writes: bool = True
    resumes: bool = True


def _compress(*settings: object) -> Callable[[Models, Path], Arguments]:
    return lambda m, out: ("compress", m.base, m.tuned, "-o", out, *settings)


JOBS = {
    job.name: job
    for job in (
        Job("compress exact", _compress("--method", "lossless"), ("base", "tuned"), 6),
        Job(
            "compress lossy", _compress("--method", "lowrank", "--file-ratio", 2.4),
            ("base", "tuned"), 8,
        ),
        Job(
            "compress auto",
            lambda m, out: (*_compress("--file-ratio", 3, "--calibration", m.text)(m, out), *LITTLE),
            ("base", "tuned"), 3,
        ),
        Job(
            "restore", lambda m, out: ("restore", m.lossy, "--base", m.base, "-o", out),
            ("base", "lossy"), 10,
        ),
        Job("merge", lambda m, out: ("merge", m.base, m.lossy, m.other, "-o", out), ("base", "lossy", "other"), 5),
        Job(
            "fold",
            lambda m, out: ("fold", m.base, "-o", out, "-n", 1, "--calibration", m.text, *LITTLE),
            ("base",), 3,
        ),
        Job(
            "factor",
            lambda m, out: ("factor", m.base, "-o", out, "--calibration", m.text, *LITTLE),
            ("base",), 3,
        ),
        Job(
            "share",
            lambda m, out: (
                "share", m.base, "-o", out, "-n", 1, "-r", 2, "--protect", "0,-1",
                "--calibration", m.text, "--steps", 4,
            ),
            ("base",), 3,
        ),
        Job("export", lambda m, out: ("export", m.lossy, "--base", m.base, "-o", out), ("base", "lossy"), 4),
        Job("verify", lambda m, out: ("verify", m.lossy, "--base", m.base), ("base", "lossy"), 4, False),
        Job("verify alone", lambda m, out: ("verify", m.lossy), ("lossy",), 4, False),
        Job("load", lambda m, out: ("load", m.lossy, m.base), ("base", "lossy"), 3, False),
    )
}  # fmt: skip


def carry_out(job: Job, models: Models, out: Path, *more: object) -> Told:
    """Run a job in this process. `load` has no command: it is called, and tells a digest."""
    arguments = job.arguments(models, out)
    if arguments[0] == "load":
        return _load(models)
    return deltafold(*arguments, "--workers", 1, *more)  # one: calls come in the same order


def _load(models: Models) -> Told:
    import contextlib
    import os

    from deltafold import load
    from deltafold.foreign import told

    # transformers may say something of its own while it loads
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            state = load(models.lossy, base=models.base, workers=1).state_dict()
        except Exception as error:
            found = told(error)
            return Told(found.exit_code, "", f"deltafold: {found}\n")
    return Told(
        0,
        hashlib.sha256(save({k: v.contiguous().clone() for k, v in state.items()})).hexdigest(),
        "",
    )


def result_of(job: Job, out: Path, told: Told) -> object:
    """What a job came to, to be compared: hashes of the files, or what was loaded."""
    if job.writes:
        return tree_hashes(out) if out.is_dir() else None
    return told.out if job.name == "load" else told.code == 0
