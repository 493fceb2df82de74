"""`deltafold methods`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command
from deltafold.compressing.request import MethodsRequest


def _show(found: list[dict[str, Any]], request: MethodsRequest) -> None:
    from deltafold.cli.show import out, say, table

    made = table("method", "what it is", "paper", ">bits/weight")
    for row in found:
        bits = "exact" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        name = row["name"] if row["method"] else f"({row['name']})"
        made.add_row(name, row["title"], row["paper"], bits)
    out.print(made)
    rows, columns = request.shape
    say(
        f"bits/weight: true bits stored for a {rows} x {columns} matrix at "
        "nominal ratio 32 (0.5 bit); what exceeds 0.5 is positions, scales and counts.\n"
        "In brackets: chosen by itself where it fits."
    )


methods = command(MethodsRequest, "deltafold.compressing.catalogue:run_methods", _show)
