"""`deltafold plan`, and `compress --dry-run`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deltafold.cli import options as o
from deltafold.cli.command import taking
from deltafold.cli.method_settings import METHOD_SETTINGS, with_method_settings
from deltafold.cli.share import plan_share
from deltafold.compressing.request import Budgeted, PlanRequest
from deltafold.errors import UsageError
from deltafold.sharing.request import METHODS, PLANNED, ShareRequest

SIZES = ("file_ratio", "nominal_ratio", "n_bytes")
SETTINGS = ("beta", "c", "value_dtype", "setting")


@taking(
    {ShareRequest: PLANNED, PlanRequest: SIZES}, extra=[METHOD_SETTINGS[name] for name in SETTINGS]
)
def plan(
    base: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Base checkpoint; for a method of share a folder or config.json."
        ),
    ],
    finetuned: Annotated[
        str | None,
        typer.Argument(metavar="[FINETUNED]", help="Fine-tuned checkpoint: folder or hub id."),
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="A codec (see `methods`), or deltallm and the like."),
    ] = "auto",
    json_output: o.JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Show what compress would do, from headers alone: roles, sizes, what does not match.

    With a method of share: which blocks would refer to which, and exact counts, from the config alone.
    """
    if method in METHODS:
        if finetuned is not None:
            raise UsageError(f"{method} is for one model, so {finetuned} is not needed.")
        told = {name: value for name, value in asked.items() if name in PLANNED}
        plan_share(ShareRequest(base, "plan", method, dry_run=True, **told), json_output)
        return
    if finetuned is None:
        raise UsageError(
            f"Give the fine-tune of {base}, too; or a method of share: {', '.join(METHODS)}."
        )
    if {"shared", "rank", "parameters"} & set(asked):
        raise UsageError(f"--shared, --rank and --parameters are for {', '.join(METHODS)}.")
    from deltafold.cli.show import say_sides
    from deltafold.compressing.plan import planned

    told = {name: value for name, value in asked.items() if name not in PLANNED}
    request = PlanRequest(base, finetuned, method, **with_method_settings(told))
    found = planned(request)
    if json_output:
        import json

        print(json.dumps(found))
        return
    say_sides(request.base, request.finetuned)
    show_plan(found, request)


def show_plan(found: dict[str, Any], request: Budgeted) -> None:
    """Print a plan of `compress`."""
    from rich.markup import escape

    from deltafold.cli.show import out, say, size, table

    rows = table("role", ">tensors", ">parameters", ">size", "stored by")
    for row in found["roles"]:
        approximated = row["approximated"]
        how = found["method"] if approximated == row["tensors"] else "exact"
        if 0 < approximated < row["tensors"]:
            how = f"{found['method']} ({approximated}), exact"
        rows.add_row(
            row["role"], str(row["tensors"]), f"{row['elements']:,}", size(row["n_bytes"]), how
        )
    out.print(rows)
    if found["looks_swapped"]:
        say(f"[bold]Base and fine-tune look swapped[/bold]: {escape(found['looks_swapped'])}")
    if found["names"]:
        say(escape("names of the fine-tune in the base: " + "; ".join(found["names"][:6])))
    for words, key in (
        ("only in the fine-tune, stored whole", "only_in_finetuned"),
        ("only in the base, marked as removed", "only_in_base"),
        ("stored in another dtype than the base's", "dtype_changed"),
    ):
        if found[key]:
            more = f" and {len(found[key]) - 3} more" if len(found[key]) > 3 else ""
            say(f"{words}: {', '.join(found[key][:3])}{more}")
    for grown in found["vocabulary_changed"]:
        say(
            f"vocabulary: {grown['name']} has {grown['base_rows']} rows in the base, {grown['rows']} here"
        )
    say(f"tied head: {'yes' if found['tied_head'] else 'no'}")
    expected = found["expected_bytes"]
    say(
        f"checkpoint {size(found['checkpoint_bytes'])} -> archive about [bold]{size(expected)}[/bold] "
        f"({found['checkpoint_bytes'] / expected:.1f}x); tensors that turn out equal will cost nothing"
    )
    if not found["feasible"]:
        say("[bold]This budget may not be met[/bold]: exact tensors alone take more than it.")
    say(
        f"memory about {size(found['memory_bytes'])} and the Python process, "
        f"disk {size(found['disk_bytes'])} while it runs"
    )
