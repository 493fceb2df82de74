"""`deltafold plan`, and `compress --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from deltafold.cli.command import Extras, command
from deltafold.cli.method_settings import METHOD_SETTINGS, with_method_settings
from deltafold.cli.share import show_sharing
from deltafold.compressing.request import Budgeted
from deltafold.errors import UsageError
from deltafold.running.request import WHAT, argument, asked, flag_of, options_of
from deltafold.sharing.request import METHODS, PLANNED, ShareRequest

SETTINGS = ("beta", "c", "value_dtype", "setting")


@asked
class PlanEitherRequest(Budgeted):
    """Show what compress would do, from headers alone: roles, sizes, what does not match.

    Example: deltafold plan base/ math/ --file-ratio 64
    """

    more_help = (
        "With a method of share: which blocks would refer to which, and exact counts, from the config "
        "alone."
    )

    base: str | Path = argument(
        "Base checkpoint; for a method of share a folder or config.json.",
        kw_only=False, metavar="MODEL",
    )  # fmt: skip
    finetuned: str | Path | None = argument(
        "Fine-tuned checkpoint: folder or hub id.", default=None, kw_only=False
    )
    method: str = argument(
        "A codec (see `methods`), or deltallm and the like.",
        default="auto", kw_only=False, flag="--method", flags=("-m",), panel=WHAT,
    )  # fmt: skip
    sharing: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Options of `share`."""

    @property
    def shares(self) -> bool:
        """True for a method of `share`."""
        return self.method in METHODS

    def as_share(self) -> ShareRequest:
        """What `share` would be asked. Raises UsageError."""
        return ShareRequest(self.base, "plan", self.method, dry_run=True, **self.sharing)

    def check(self) -> None:
        """Raises UsageError."""
        if self.shares:
            if self.finetuned is not None:
                raise UsageError(
                    f"{self.method} is for one model, so {self.finetuned} is not needed."
                )
            self.as_share()
            return
        if self.finetuned is None:
            raise UsageError(
                f"Give the fine-tune of {self.base}, too; or a method of share: {', '.join(METHODS)}."
            )
        if self.sharing:
            options = options_of(ShareRequest)
            flags = " and ".join(options[name].flag or flag_of(name) for name in self.sharing)
            are = "are" if len(self.sharing) > 1 else "is"
            raise UsageError(f"{flags} {are} for {', '.join(METHODS)}.")


def run_plan(request: PlanEitherRequest) -> dict[str, Any]:
    """The plan of `compress`, or of `share`."""
    if request.shares:
        from deltafold.sharing.job import plan_sharing

        return plan_sharing(request.as_share())
    from deltafold.compressing.plan import planned

    return planned(request)


def _fields(asked: dict[str, Any]) -> dict[str, Any]:
    """What is given, with options of `share` and of a codec in the fields for them."""
    sharing = {name: asked.pop(name) for name in PLANNED if name in asked}
    return with_method_settings(asked) | {"sharing": sharing}


def _show(found: dict[str, Any], request: PlanEitherRequest) -> None:
    if request.shares:
        show_sharing(found)
        return
    from deltafold.cli.show import say_sides

    assert request.finetuned is not None
    say_sides(request.base, request.finetuned)
    show_plan(found, request)


plan = command(
    PlanEitherRequest,
    "deltafold.cli.plan:run_plan",
    _show,
    extras=Extras(_fields, [METHOD_SETTINGS[name] for name in SETTINGS], {ShareRequest: PLANNED}),
)
plan.__name__ = "plan"


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
