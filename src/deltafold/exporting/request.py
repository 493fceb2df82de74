"""What `export` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from deltafold.running.common import Clustered, Writing
from deltafold.running.request import OUTPUT, SIZE, TEXT, argument, asked, option, parse_bytes

FORMATS = ("peft", "gguf-lora")
RUNTIMES = ("peft", "vllm")
Rest = Literal["lora", "fold", "drop"]
RESTS: tuple[Rest, ...] = ("lora", "fold", "drop")


@asked
class ExportRequest(Clustered, Writing):
    """Write an archive as a LoRA adapter: for peft, vLLM or llama.cpp.

    Ranks: `rank`, or the fewest components that hold the share `energy` of each delta, or what keeps
    most in `n_bytes`; by default stored factors as they are, else rank 64. Returns the record. Raises
    UsageError, BudgetError, MismatchError, ArchiveError, CheckpointError; nothing is left under `output`
    then.

    Example: deltafold export math.delta --to peft -o math-adapter/ --rank 64
    """

    archive: str | Path = argument("Archive folder.", kw_only=False)
    output: str | Path = argument(
        "Folder or file to write.", kw_only=False, flag="--output", flags=("-o",), panel=OUTPUT
    )
    to: str = argument(
        "peft (a folder), or gguf-lora (a file for llama.cpp).",
        default="peft", kw_only=False, flag="--to", choices=FORMATS, noun="format", identity=True,
    )  # fmt: skip
    base: str | Path | None = option(
        "The base. Default: the one the archive names.", default=None, identity=False, record=False
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
