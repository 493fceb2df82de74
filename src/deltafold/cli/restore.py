"""`deltafold restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltafold.cli import options as o


def restore(
    archive: o.ArchiveArgument,
    base: Annotated[str, typer.Option("--base", help="The base: folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    tensor: Annotated[
        list[str] | None, typer.Option("--tensor", help="Restore this tensor alone (repeatable).")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest weight file, e.g. 5GB. Default: as the fine-tune's.")
    ] = None,
    device: o.ComputeOption = None,
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    engine: o.EngineOption = "threads",
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
) -> None:
    """Restore an archive to an ordinary Hugging Face folder.

    Example: deltafold restore math.delta --base base/ -o restored/
    """
    from deltafold.cli.show import device_lines, duration, progress, say, size
    from deltafold.restoring.restore import restore as restore_verb

    with progress() as advance:
        result = restore_verb(
            archive,
            base,
            output,
            tensors=tensor or None,
            shard_bytes=o.parse_bytes(shard_size, "--shard-size"),
            overwrite=overwrite,
            restart=restart,
            device=device,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            engine=engine,
            progress=advance,
            record=record,
        )
    say(
        f"[bold]{result['output']}[/bold]  {result['tensors_restored']} tensors restored in "
        f"{duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}"
    )
    for line in device_lines(result):
        say(line)
