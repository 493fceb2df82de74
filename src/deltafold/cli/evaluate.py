"""`deltafold evaluate`: base, fine-tune and candidates in one table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from deltafold.cli.command import command
from deltafold.evaluation.request import EvaluateRequest


@contextlib.contextmanager
def _status(_: object) -> Iterator[dict[str, Any]]:
    """What is going on, in one line on a terminal."""
    from rich.markup import escape

    from deltafold.cli.show import err

    if not err.is_terminal:
        yield {}
        return
    with err.status("starting") as shown:
        yield {"report": lambda line: shown.update(escape(line))}


def _show(record: dict[str, Any], _: EvaluateRequest) -> None:
    from rich.console import Console

    from deltafold.evaluation.table import explanations, rich_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(200, console.width))  # a file or pipe has no edge to wrap at
    console.print(rich_table(record))
    for line in explanations(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


evaluate = command(
    EvaluateRequest, "deltafold.evaluation.evaluate:run_evaluate", _show, watch=_status
)
