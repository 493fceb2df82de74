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
