"""`deltafold inspect`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command
from deltafold.restoring.request import InspectRequest


def _show(found: dict[str, Any], request: InspectRequest) -> None:
    from deltafold.cli.show import out, say, size

    totals, budget = found["totals"], found["budget"]
    asked = f" (asked: {budget['kind'].replace('_', ' ')} {budget['asked']:g})" if budget else ""
    named = (
        f"fine-tune [bold]{found['finetuned']}[/bold] on base [bold]{found['base']}[/bold], "
        if found["base"]
        else ""
    )
    say(f"[bold]{found['archive']}[/bold]  {named}method {found['method']}{asked}")
    say(
        f"  {size(totals['checkpoint_bytes'])} -> {size(totals['archive_bytes'])}: file ratio "
        f"{totals['file_ratio']:.2f}"
        + (f", nominal ratio {totals['nominal_ratio']:.1f}" if totals["nominal_ratio"] else "")
    )
    say(
        f"  payload {size(totals['payload_bytes'])}, manifest {size(totals['manifest_bytes'])}, "
        f"side files {size(totals['files_bytes'])} ({len(found['files'])} files)"
    )
    for name, entry in found["codecs"].items():
        config = ", ".join(f"{key} {value}" for key, value in entry["config"].items())
        say(f"  codec {name} version {entry['version']}" + (f": {config}" if config else ""))
    out.print(_tensor_table(found["tensors"]) if request.tensors else _role_table(found["tensors"]))
    if found["removed"]:
        say(f"  only in the base: {', '.join(found['removed'])}")


def _role_table(rows: list[dict[str, Any]]) -> Any:
    from deltafold.cli.show import size, table

    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        entry = sums.setdefault((row["role"], row["codec"]), [0, 0, 0.0])
        entry[0] += 1
        entry[1] += row["bytes"]
        entry[2] = max(entry[2], row["error"] or 0.0)
    made = table("role", "codec", ">tensors", ">bytes", ">largest error")
    for (role, codec), (count, n_bytes, error) in sorted(sums.items()):
        made.add_row(
            role, codec, f"{count:.0f}", size(n_bytes), f"{error:.3f}" if error else "exact"
        )
    return made


def _tensor_table(rows: list[dict[str, Any]]) -> Any:
    from deltafold.cli.show import size, table

    made = table("tensor", "shape", "codec", ">bytes", ">error", "why")
    for row in rows:
        error = "exact" if row["error"] is None else f"{row['error']:.3f}"
        shape = "x".join(map(str, row["shape"]))
        made.add_row(row["name"], shape, row["codec"], size(row["bytes"]), error, row["why"] or "")
    return made


inspect = command(InspectRequest, "deltafold.restoring.inspect:run_inspect", _show)
