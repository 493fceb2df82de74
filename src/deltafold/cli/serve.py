"""`deltafold serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltafold.cli import options as o
from deltafold.errors import UsageError


def serve(
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="Base checkpoint: folder or hub id.")
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: options for vllm serve.")
    ] = None,
    delta: Annotated[
        list[str] | None,
        typer.Option("--delta", "-d", metavar="NAME=ARCHIVE", help="A fine-tune (repeatable)."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Components of each delta, at most. Default: 64.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="Room for adapters that are added later, in ranks.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    vllm: Annotated[
        Path | None, typer.Option(help="The program vllm, if it has an environment of its own.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=ARCHIVE", help="Add to the engine that runs at --to."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Take from the engine at --to.")
    ] = None,
    to: Annotated[
        str, typer.Option(help="Address of an engine that runs, for --add and --remove.")
    ] = "http://127.0.0.1:8000",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Export, then print vLLM's command line only.")
    ] = False,
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
) -> None:
    """Serve fine-tunes as model names over one copy of their base, on vLLM.

    Example: deltafold serve base/ --delta math=math.delta --delta sql=sql.delta
    """
    from deltafold.cli.show import say

    deltas, added = named_paths(delta, "--delta"), named_paths(add, "--add")
    memory_bytes = o.parse_bytes(memory, "--memory")
    if added or remove:
        if deltas:
            raise UsageError("--add and --remove speak to an engine that runs; drop --delta.")
        _change(to, added, remove or [], base, rank, workers, memory_bytes)
        return
    if base is None or not deltas:
        raise UsageError("Give BASE and at least one --delta NAME=ARCHIVE.")
    from deltafold.cli.show import progress
    from deltafold.exporting.serve import prepare, run

    with progress() as advance:
        serving = prepare(
            base, deltas, vllm=vllm, rank=rank, max_rank=max_rank, host=host, port=port,
            extra=extra or [], workers=workers, memory_bytes=memory_bytes, progress=advance,
        )  # fmt: skip
    for each in serving.adapters:
        lost = (
            "" if each.relative_error is None else f", error of the delta {each.relative_error:.4f}"
        )
        say(f"[bold]{each.name}[/bold]  {each.folder}{lost}")
    if dry_run:
        import shlex

        variables = [f"{key}={value}" for key, value in serving.environment.items()]
        print(" ".join([*variables, shlex.join(serving.command)]))
        return
    run(serving)


def _change(
    to: str,
    added: dict[str, str],
    removed: list[str],
    base: str | None,
    rank: int | None,
    workers: int | None,
    memory_bytes: int | None,
) -> None:
    from deltafold.cli.show import progress, say
    from deltafold.exporting.serve import add_adapter, remove_adapter, served_names

    for name in removed:
        remove_adapter(to, name)
    for name, path in added.items():
        with progress() as advance:
            add_adapter(
                to, name, path, base, rank=rank, workers=workers, memory_bytes=memory_bytes,
                progress=advance,
            )  # fmt: skip
    say(f"[bold]{to}[/bold]  {', '.join(served_names(to))}")


def named_paths(items: list[str] | None, option: str) -> dict[str, str]:
    """`NAME=PATH` items as a dictionary. Raises UsageError.

    >>> named_paths(["math=math.delta"], "--delta")
    {'math': 'math.delta'}
    """
    found: dict[str, str] = {}
    for item in items or []:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{option} {item!r} is not NAME=ARCHIVE, like math=math.delta.")
        if name in found:
            raise UsageError(f"{option} gives {name!r} twice; choose another name for one.")
        found[name] = path
    return found
