"""`deltafold restore`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command
from deltafold.restoring.request import RestoreRequest


def _show(result: dict[str, Any], request: RestoreRequest) -> None:
    from deltafold.cli.show import device_lines, duration, say, size

    if request.dry_run:
        say(
            f"[bold]{result['output']}[/bold]  {result['tensors_restored']} tensors would be restored"
        )
        return
    say(
        f"[bold]{result['output']}[/bold]  {result['tensors_restored']} tensors restored in "
        f"{duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}"
    )
    for line in device_lines(result):
        say(line)


restore = command(RestoreRequest, "deltafold.restoring.restore:run_restore", _show)
