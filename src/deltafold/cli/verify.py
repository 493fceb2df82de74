"""`deltafold verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from deltafold.cli import options as o


def verify(
    archive: o.ArchiveArgument,
    base: Annotated[
        str | None, typer.Option("--base", help="The base, to check that it is.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The fine-tune, to measure the distance.")
    ] = None,
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Check an archive: every checksum; with --base that all decodes; with --against how close."""
    from deltafold.cli.show import duration, progress, say
    from deltafold.restoring.verify import verify as verify_verb

    with progress() as advance:
        found = verify_verb(
            archive,
            base,
            against,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            progress=advance,
        )
    if json_output:
        import json

        print(json.dumps(found))
        return
    say(f"{archive}: all parts of {found['tensors_checked']} tensors are whole")
    if base is None:
        say("  give --base to check that everything decodes")
    else:
        say(
            f"  {base} is its base; {found['tensors_decoded']} tensors decode, "
            f"{found['tensors_exact']} of them equal the fine-tune bit for bit"
        )
    if found["relative_error"] is not None:
        say(f"  relative error of the restored delta: {found['relative_error']:.4f}")
    say(f"  {duration(found['seconds'])}")
