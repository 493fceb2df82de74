"""`deltafold push`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command
from deltafold.publishing.request import PushRequest


def _show(made: dict[str, Any], _: PushRequest) -> None:
    from deltafold.cli.show import say, size

    say(f"[bold]{made['url']}[/bold]  {len(made['files'])} files, {size(made['n_bytes'])}")
    say(f"  commit {made['commit'][:12]}")


push = command(PushRequest, "deltafold.publishing.push:run_push", _show)
