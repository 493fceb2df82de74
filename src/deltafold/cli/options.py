"""Options that several commands share, and small helpers to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.errors import UsageError

BaseArgument = Annotated[
    str, typer.Argument(metavar="BASE", help="Base checkpoint: folder or hub id (org/name@rev).")
]
FinetunedArgument = Annotated[
    str, typer.Argument(metavar="FINETUNED", help="Fine-tuned checkpoint: folder or hub id.")
]
ArchiveArgument = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Archive folder.")]
MethodOption = Annotated[
    str, typer.Option("--method", "-m", help="Codec for the large matrices; see `methods`.")
]
FileRatioOption = Annotated[
    float | None,
    typer.Option(help="Checkpoint bytes / archive bytes, all files counted. Default: 32."),
]
NominalRatioOption = Annotated[
    float | None,
    typer.Option(
        help="The papers' ratio: values of linear layers only, scales and positions free."
    ),
]
BytesOption = Annotated[
    str | None, typer.Option("--bytes", help="Size of the archive, e.g. 8MB or 120000.")
]
BetaOption = Annotated[
    str | None,
    typer.Option(help="impart: share of components dropped beforehand (0 to 0.99), or auto."),
]
COption = Annotated[
    str | None, typer.Option("--C", help="impart: exponent of importance, or auto.")
]
ValueDtypeOption = Annotated[
    str | None, typer.Option(help="Dtype of stored values: fp16 (default) or bf16.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Any other setting of the method."),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help="Threads. Default: one a core.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", help="Memory that running tasks may hold together, e.g. 2GB."),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="threads|ray",
        help="What runs the work: threads of this process, or a Ray cluster.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Drop unfinished work of an earlier run.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
RecordOption = Annotated[
    Path | None, typer.Option("--record", help="Where the record goes. Default: beside the output.")
]
TaskOption = Annotated[
    list[Path] | None,
    typer.Option("--task", help="Rows to answer before and after, as evaluate takes them."),
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Only the first rows of a task.")]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", help="Rows answered at a time, at most.")
]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", help="To answer in: auto (the model's own), fp32, bf16 or fp16."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where to compute and to answer: auto, cpu, cuda or cuda:N. Default: compute on the "
        "CPU, train and answer on cuda if there is one.",
    ),
]
ComputeOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where heavy steps compute: cpu (the default), cuda, cuda:N, or auto: cuda if there "
        "is one.",
    ),
]
ShardSizeOption = Annotated[str, typer.Option("--shard-size", help="Largest weight file.")]
AnswersOption = Annotated[
    int,
    typer.Option(
        "--answers", min=0, help="Rows of each task of which the record keeps what models wrote."
    ),
]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


# What the verbs take beside a method's settings.
_NO_SETTINGS = {
    "base", "finetuned", "output", "method", "file_ratio", "nominal_ratio", "n_bytes", "seed",
    "fallback", "overwrite", "restart", "workers", "memory_bytes", "engine", "progress", "record",
    "calibration", "samples", "max_tokens", "kl_at_most", "distill", "tasks", "limit", "answers",
    "device",
}  # fmt: skip


def record_place(record: Path | None, output: Path) -> str:
    """Where the record of an output is, to be shown: an address stays one."""
    from deltafold.checkpoint.store import shown
    from deltafold.running.record import record_path

    return shown(record or record_path(output))


def parse_bytes(text: str | None, option: str) -> int | None:
    """`8MB`, `1.5GiB`, `120000` to bytes; None stays None.

    >>> parse_bytes("8MB", "--bytes")
    8000000
    """
    if text is None:
        return None
    number = text.strip().rstrip("BKMGIbkmgi ")
    unit = text.strip()[len(number) :].strip().upper()
    unit += "B" if unit in ("K", "M", "G", "KI", "MI", "GI") else ""
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UsageError(f"{option} {text!r} is no size; write it like 8MB or 120000.") from None
    if not 1 <= value < float("inf"):
        raise UsageError(f"{option} must be at least 1 byte, not {text!r}.")
    return int(value)


def number_or_auto(text: str | None, option: str) -> float | str | None:
    """A number, `auto`, or None."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option} must be a number or auto, not {text!r}.") from None


def method_options(
    beta: str | None, c: str | None, value_dtype: str | None, settings: list[str] | None
) -> dict[str, Any]:
    """The method's settings as keyword arguments of a verb; absent ones are left out."""
    named = {
        "beta": number_or_auto(beta, "--beta"),
        "c": number_or_auto(c, "--C"),
        "value_dtype": value_dtype,
    }
    options = {name: value for name, value in named.items() if value is not None}
    for item in settings or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {item!r} is not KEY=VALUE.")
        name = key.replace("-", "_")
        if name in _NO_SETTINGS:
            raise UsageError(f"--set {item!r} is no setting of a method; use the option for it.")
        options[name] = _literal(value)
    return options


def _literal(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
