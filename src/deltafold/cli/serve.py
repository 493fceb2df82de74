"""`deltafold serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltafold.cli.command import command
from deltafold.exporting.request import ServeRequest

if TYPE_CHECKING:
    from deltafold.exporting.serve import Changed, Serving


def _show(found: Serving | Changed, request: ServeRequest) -> None:
    from deltafold.cli.show import say
    from deltafold.exporting.serve import Changed

    if isinstance(found, Changed):
        say(f"[bold]{found.url}[/bold]  {', '.join(found.models)}")
        return
    for each in found.adapters:
        lost = (
            "" if each.relative_error is None else f", error of the delta {each.relative_error:.4f}"
        )
        say(f"[bold]{each.name}[/bold]  {each.folder}{lost}")
    if request.dry_run:
        import shlex

        variables = [f"{key}={value}" for key, value in found.environment.items()]
        print(" ".join([*variables, shlex.join(found.command)]))


def _plain(found: Serving | Changed) -> dict[str, Any]:
    return found.to_json()


def _after(found: Serving | Changed, request: ServeRequest) -> None:
    """Become the engine, where one is to be started."""
    from deltafold.exporting.serve import Serving, run

    if isinstance(found, Serving) and not request.dry_run:
        run(found)


serve = command(
    ServeRequest, "deltafold.exporting.serve:run_serve", _show, plain=_plain, after=_after
)
