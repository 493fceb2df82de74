"""`deltafold push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltafold.cli import options as o


def push(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An archive, or a checkpoint folder.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Where on the hub; @BRANCH for a branch.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made.")
    ] = False,
    license_id: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="For the card, e.g. apache-2.0. Default: what the fine-tune's card says.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="The run's record. Default: the one beside it.", show_default=False),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", help="Of the commit.", show_default=False)
    ] = None,
    json_output: o.JsonOption = False,
) -> None:
    """Push an archive or a checkpoint to the Hugging Face Hub, with a card written from its record.

    Example: deltafold push math.delta me/math-delta --private
    """
    from deltafold.cli.show import say, size
    from deltafold.publishing import push_to_hub

    made = push_to_hub(
        source, repo, private=private, license=license_id, record=record, message=message
    )
    if json_output:
        import json

        print(json.dumps(made))
        return
    say(f"[bold]{made['url']}[/bold]  {len(made['files'])} files, {size(made['n_bytes'])}")
    say(f"  commit {made['commit'][:12]}")
