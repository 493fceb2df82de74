"""What many verbs are asked alike: where work runs, what is written, on which text. See `request.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltafold.running.engine import Progress
from deltafold.running.request import (
    OUTPUT,
    TEXT,
    WHAT,
    WHERE,
    Request,
    argument,
    asked,
    option,
    parse_bytes,
)

SHARD_BYTES = 5_000_000_000


@asked
class Tasked(Request):
    """Work that is done in tasks, a tensor each. How many at a time changes no byte."""

    workers: int | None = option(
        "Threads. Default: one a core.",
        default=None, panel=WHERE, flags=("-j",), low=1, identity=False, record=False,
    )  # fmt: skip
    memory_bytes: int | None = option(
        "Memory that running tasks may hold together, e.g. 2GB.",
        default=None, panel=WHERE, flag="--memory", parse=parse_bytes, low=1, identity=False, record=False,
    )  # fmt: skip
    progress: Progress | None = option(
        "Called with a `Step` as the work goes on.",
        default=None, panel=WHERE, identity=False, record=False, cli=False,
    )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """A request that goes to other processes with a task leaves its progress bar behind."""
        return {**self.__dict__, "progress": None}


@asked
class Running(Tasked):
    """Work that may be taken up again, and may compute elsewhere. Only the device changes a byte."""

    device: str | None = option(
        "Where heavy steps compute: cpu (the default), cuda, cuda:N, or auto: cuda if there is one.",
        default=None, panel=WHERE, identity=False, record=False,
    )  # fmt: skip
    restart: bool = option(
        "Drop unfinished work of an earlier run.",
        default=False, panel=WHERE, identity=False, record=False,
    )  # fmt: skip


@asked
class Clustered(Running):
    """Work whose tasks may run on a cluster."""

    engine: str = option(
        "What runs the work: threads of this process, or a Ray cluster.",
        default="threads", panel=WHERE, metavar="threads|ray", choices=("threads", "ray"), noun="engine",
        identity=False, record=False,
    )  # fmt: skip


@asked
class Writing(Request):
    """A verb that writes an output, and a record beside it."""

    overwrite: bool = option(
        "Replace an existing output.", default=False, panel=OUTPUT, identity=False, record=False
    )
    record: str | Path | None = option(
        "Where the record goes. Default: beside the output.",
        default=None, panel=OUTPUT, identity=False, record=False,
    )  # fmt: skip
    dry_run: bool = option(
        "Say what would be done; read headers only, write nothing.",
        default=False, panel=OUTPUT, identity=False, record=False,
    )  # fmt: skip


@asked
class Sharded(Writing):
    """A verb that writes a checkpoint."""

    shard_bytes: int = option(
        "Largest weight file, e.g. 5GB.",
        default=SHARD_BYTES, panel=OUTPUT, flag="--shard-size", parse=parse_bytes, low=1, shown_default="5GB",
        record=False,
    )  # fmt: skip


@asked
class Pair(Request):
    """A fine-tune beside its base."""

    base: str | Path = argument("Base checkpoint: folder or hub id (org/name@rev).", kw_only=False)
    finetuned: str | Path = argument("Fine-tuned checkpoint: folder or hub id.", kw_only=False)


@asked
class OfArchive(Request):
    """A verb that reads an archive."""

    archive: str | Path = argument("Archive folder.", kw_only=False)


@asked
class OneModel(Sharded):
    """A verb that makes another model of one."""

    model: str | Path = argument("Checkpoint: folder or hub id.", kw_only=False)
    output: str | Path = argument(
        "Folder to write.", kw_only=False, flag="--output", flags=("-o",), panel=OUTPUT
    )


@asked
class Sampled(Request):
    """A verb that looks at what the model does on a text, and measures it on another."""

    samples: int = option("Samples of the text, at most.", default=256, panel=TEXT)
    max_tokens: int = option("Tokens of a sample, at most.", default=128, panel=TEXT)
    text: str | Path | None = option(
        "Text to measure perplexity and KL on, not that of --calibration.",
        default=None, panel=TEXT, old=("measure",), old_flags=("--measure",), identity=False,
    )  # fmt: skip


@asked
class Seeded(Request):
    """A verb with random choices."""

    seed: int = option(
        "Seed of random choices.", default=0, panel=WHAT, low=0, below=1 << 63,
        wrong="seed must lie between 0 and 2^63 - 1, not {value}.",
    )  # fmt: skip


@asked
class Answered(Request):
    """A verb that lets models answer rows of tasks."""

    tasks: Sequence[str | Path] = option(
        "JSON lines of prompts and answers, or of multiple choice.",
        default=(), panel=TEXT, flag="--task", identity=False, record=False,
    )  # fmt: skip
    limit: int | None = option(
        "Only the first rows of a task, and windows of a text.", default=None, panel=TEXT, low=1,
        identity=False, record=False,
    )  # fmt: skip
    answers: int = option(
        "Rows of each task of which the record keeps what models wrote.",
        default=4, panel=TEXT, low=0, identity=False, record=False,
    )  # fmt: skip
    batch_size: int = option(
        "Rows at a time, at most.", default=8, panel=TEXT, low=1, identity=False, record=False
    )


@asked
class Generating(Request):
    """A verb that runs models."""

    dtype: str = option(
        "To run models in: auto (what is stored), fp32, bf16 or fp16.",
        default="auto", panel=TEXT, choices=("auto", "fp32", "bf16", "fp16"), noun="dtype",
        identity=False, record=False,
    )  # fmt: skip


@asked
class Scored(Generating, Answered):
    """A verb that can answer tasks and measure texts, before and after. Nothing of it is stored."""

    tasks: Sequence[str | Path] = option(
        "Rows to answer before and after, as evaluate takes them.",
        default=(), panel=TEXT, flag="--task", identity=False, record=False,
    )  # fmt: skip


@asked
class ModelsAlone(Generating):
    """A verb that only runs models, where there is a GPU on it."""

    device: str | None = option(
        "cpu, cuda or cuda:N. Default: cuda if there is one.", default=None, panel=WHERE
    )
