"""Options that several commands share, and small helpers to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltafold.running import request

BaseArgument = Annotated[
    str, typer.Argument(metavar="BASE", help="Base checkpoint: folder or hub id (org/name@rev).")
]
FinetunedArgument = Annotated[
    str, typer.Argument(metavar="FINETUNED", help="Fine-tuned checkpoint: folder or hub id.")
]
ArchiveArgument = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Archive folder.")]
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
AnswersOption = Annotated[
    int,
    typer.Option(
        "--answers", min=0, help="Rows of each task of which the record keeps what models wrote."
    ),
]


def parse_bytes(text: str | None, option: str) -> int | None:
    """As `running.request.parse_bytes`; None stays None."""
    return None if text is None else request.parse_bytes(text, option)
