"""What `export` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from deltafold.errors import UsageError
from deltafold.running.common import Clustered, OfArchive, Tasked, Writing
from deltafold.running.request import (
    OUTPUT,
    SIZE,
    TEXT,
    WHERE,
    argument,
    asked,
    option,
    parse_bytes,
)

FORMATS = ("peft", "gguf-lora")
RUNTIMES = ("peft", "vllm")
Rest = Literal["lora", "fold", "drop"]
RESTS: tuple[Rest, ...] = ("lora", "fold", "drop")


@asked
class ExportRequest(Clustered, Writing, OfArchive):
    """Write an archive as a LoRA adapter: for peft, vLLM or llama.cpp.

    Ranks: `rank`, or the fewest components that hold the share `energy` of each delta, or what keeps
    most in `n_bytes`; by default stored factors as they are, else rank 64. Returns the record. Raises
    UsageError, BudgetError, MismatchError, ArchiveError, CheckpointError; nothing is left under `output`
    then.

    Example: deltafold export math.delta --to peft -o math-adapter/ --rank 64
    """

    output: str | Path = argument(
        "Folder or file to write.", kw_only=False, flag="--output", flags=("-o",), panel=OUTPUT
    )
    to: str = argument(
        "peft (a folder), or gguf-lora (a file for llama.cpp).",
        default="peft", kw_only=False, flag="--to", choices=FORMATS, noun="format", identity=True,
    )  # fmt: skip
    base: str | Path | None = option(
        "The base. Default: the one in the archive's record.",
        default=None,
        identity=False,
        record=False,
    )
    rank: int | None = option("Components of each delta, at most.", default=None, panel=SIZE)
    energy: float | None = option(
        "Or: as many as hold this share of it, e.g. 0.95.", default=None, panel=SIZE
    )
    n_bytes: int | None = option(
        "Or: what keeps most in this size, e.g. 20MB.",
        default=None, panel=SIZE, flag="--bytes", parse=parse_bytes,
    )  # fmt: skip
    rest: str = option(
        "Norms, embeddings, head: lora (as pairs), fold (into a base beside the adapter), or drop.",
        default="lora",
    )  # fmt: skip
    runtime: str = option(
        "Keep what this runtime takes: peft or vllm.", default="peft", flag="--for"
    )
    calibration: str | Path | None = option(
        "Text to fit pairs by and to measure: a file, datasets:NAME, general.",
        default=None, panel=TEXT, old=("text",), old_flags=("--text",),
    )  # fmt: skip
    samples: int = option("Samples of the text, at most.", default=32, panel=TEXT)
    max_tokens: int = option("Tokens of a sample, at most.", default=256, panel=TEXT)

    def __post_init__(self) -> None:
        if self.engine in RUNTIMES:  # what `engine` meant before it said where tasks run
            warnings.warn(
                "engine is called runtime now; the former name goes with the next release.",
                FutureWarning,
                stacklevel=4,
            )
            object.__setattr__(self, "runtime", self.engine)
            object.__setattr__(self, "engine", "threads")
        super().__post_init__()


Named = Mapping[str, str | Path] | Sequence[str]
"""Fine-tunes by name: a mapping, or `NAME=ARCHIVE` each."""


@asked
class ServeRequest(Tasked):
    """Serve fine-tunes as model names over one copy of their base, on vLLM.

    Example: deltafold serve base/ --delta math=math.delta --delta sql=sql.delta
    """

    base: str | Path | None = argument(
        "Base checkpoint: folder or hub id.", default=None, kw_only=False
    )
    extra: Sequence[str] = argument("After --: options for vllm serve.", default=(), kw_only=False)
    delta: Named = option(
        "A fine-tune, as NAME=ARCHIVE (repeatable).",
        default=(),
        flags=("-d",),
        metavar="NAME=ARCHIVE",
    )
    add: Named = option(
        "Add NAME=ARCHIVE to the engine that runs at --to (repeatable).",
        default=(),
        metavar="NAME=ARCHIVE",
    )
    remove: Sequence[str] = option(
        "Take NAME from the engine at --to (repeatable).", default=(), metavar="NAME"
    )
    rank: int | None = option(
        "Components of each delta, at most. Default: 64.", default=None, panel=SIZE, low=1
    )
    max_rank: int | None = option(
        "Room for adapters that are added later, in ranks.", default=None, panel=SIZE, low=1
    )
    host: str = option("Address to listen on.", default="127.0.0.1", panel=WHERE)
    port: int = option("Port to listen on.", default=8000, panel=WHERE, low=1, high=65535)
    vllm: str | Path | None = option(
        "The program vllm, if it has an environment of its own.", default=None, panel=WHERE
    )
    to: str = option(
        "Address of an engine that runs, for --add and --remove.",
        default="http://127.0.0.1:8000", panel=WHERE,
    )  # fmt: skip
    dry_run: bool = option(
        "Export, then print vLLM's command line only.", default=False, panel=OUTPUT
    )

    def check(self) -> None:
        """Raises UsageError."""
        deltas = self.deltas
        if self.changes:
            if deltas:
                raise UsageError("--add and --remove speak to an engine that runs; drop --delta.")
            if self.dry_run:
                raise UsageError("--dry-run is for an engine that is to be started; drop it.")
        elif self.base is None or not deltas:
            raise UsageError("Give BASE and at least one --delta NAME=ARCHIVE.")

    @property
    def deltas(self) -> dict[str, str | Path]:
        """What is served, by name."""
        return named_paths(self.delta, "--delta")

    @property
    def added(self) -> dict[str, str | Path]:
        """What is added to an engine that runs, by name."""
        return named_paths(self.add, "--add")

    @property
    def changes(self) -> bool:
        """True where an engine that runs is spoken to."""
        return bool(self.added or self.remove)


def named_paths(items: Named, option: str) -> dict[str, str | Path]:
    """`NAME=PATH` items as a dictionary. Raises UsageError.

    >>> named_paths(["math=math.delta"], "--delta")
    {'math': 'math.delta'}
    """
    if isinstance(items, Mapping):
        return dict(items)
    found: dict[str, str | Path] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{option} {item!r} is not NAME=ARCHIVE, like math=math.delta.")
        if name in found:
            raise UsageError(f"{option} gives {name!r} twice; choose another name for one.")
        found[name] = path
    return found
