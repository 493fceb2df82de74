"""`deltafold methods`."""

from __future__ import annotations

from deltafold.cli import options as o

_EXAMPLE_SHAPE = (2048, 2048)


def methods(json_output: o.JsonOption = False) -> None:
    """List the codecs: what each is, where it comes from, its bits per weight at a ratio of 32."""
    from deltafold.compressing.catalogue import methods as methods_verb

    found = methods_verb(_EXAMPLE_SHAPE)
    if json_output:
        import json

        print(json.dumps(found))
        return
    from deltafold.cli.show import out, say, table

    made = table("method", "what it is", "paper", ">bits/weight")
    for row in found:
        bits = "exact" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        name = row["name"] if row["method"] else f"({row['name']})"
        made.add_row(name, row["title"], row["paper"], bits)
    out.print(made)
    say(
        f"bits/weight: true bits stored for a {_EXAMPLE_SHAPE[0]} x {_EXAMPLE_SHAPE[1]} matrix at "
        "nominal ratio 32 (0.5 bit); what exceeds 0.5 is positions, scales and counts.\n"
        "In brackets: chosen by itself where it fits."
    )
