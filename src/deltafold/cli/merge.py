"""`deltafold merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltafold.cli import options as o

if TYPE_CHECKING:
    from deltafold.merging.recipe import Recipe


def merge(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    base: Annotated[str | None, typer.Argument(help="The base: folder or hub id.")] = None,
    models: Annotated[
        list[str] | None, typer.Argument(help="Fine-tunes of the base: archives, folders.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file that says all of it; ours or mergekit's.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="See docs/commands/merge.md for all.")
    ] = "ties",
    sparsify: Annotated[
        str | None, typer.Option(help="none, magnitude, dare, della, breadcrumbs or impart.")
    ] = None,
    consensus: Annotated[
        str | None, typer.Option(help="sum, mean, ties, slerp or consensus.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="Of each model in order, or one for all; see docs for gradients."),
    ] = None,
    density: Annotated[
        list[str] | None, typer.Option(help="Share of each delta to keep; as --weight.")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="Factor of the merged delta.")] = None,
    setting: o.SetOption = None,
    seed: Annotated[int, typer.Option(help="Seed of random positions.")] = 0,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Merge several fine-tunes of one base into one ordinary checkpoint.

    Example: deltafold merge base/ math.delta sql.delta chat/ -o merged/ --method ties
    """
    from deltafold.cli.show import progress
    from deltafold.record import record_path
    from deltafold.verbs.merge import merge as merge_verb

    base, recipe = _recipe(
        base, models or [], config, method, sparsify, consensus, weight, density, scale, setting
    )
    with progress() as advance:
        result = merge_verb(
            base,
            recipe,
            output,
            seed=seed,
            shard_bytes=int(o.parse_bytes(shard_size, "--shard-size") or 0),
            overwrite=overwrite,
            restart=restart,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            progress=advance,
            record=record,
        )
    if json_output:
        import json

        print(json.dumps(result))
    else:
        _show(result, record or record_path(output))


def _recipe(
    base: str | None,
    models: list[str],
    config: Path | None,
    method: str,
    sparsify: str | None,
    consensus: str | None,
    weight: list[str] | None,
    density: list[str] | None,
    scale: str | None,
    setting: list[str] | None,
) -> tuple[str, Recipe]:
    """(base, recipe) of a file, or of the command line. Raises UsageError."""
    from deltafold.errors import UsageError
    from deltafold.merging.files import read_recipe
    from deltafold.merging.recipe import Model, Recipe

    if config is not None:
        if base is not None or models:
            raise UsageError("--config names base and models; drop them from the command line.")
        return read_recipe(config)
    if base is None or not models:
        raise UsageError("Name the base and at least one fine-tune, or give --config.")
    weights = _each("--weight", weight, len(models), 1.0)
    densities = _each("--density", density, len(models), None)
    return base, Recipe(
        tuple(map(Model, models, weights, densities)),
        method,
        sparsify,
        consensus,
        None if scale is None else _value("--scale", scale),
        o.method_options(None, None, None, setting),
    )


def _each(option: str, given: list[str] | None, count: int, usual: Any) -> list[Any]:
    """One value a model. Raises UsageError for any other number of values."""
    from deltafold.errors import UsageError

    if not given:
        return [usual] * count
    values = [_value(option, text) for text in given]
    if len(values) not in (1, count):
        raise UsageError(
            f"{option} is given {len(values)} times for {count} models; give one for all or one each."
        )
    return values * count if len(values) == 1 else values


def _value(option: str, text: str) -> Any:
    """A number, or a gradient or table as JSON. Raises UsageError."""
    import json

    from deltafold.errors import UsageError

    try:
        return json.loads(text)
    except ValueError:
        raise UsageError(
            f'{option} {text!r} is not a number, nor JSON such as [0.2, 0.8] or {{"mlp": 0.5, '
            '"default": 1}.'
        ) from None


def _show(record: dict[str, Any], where: Path) -> None:
    import math

    from deltafold.cli.show import duration, say, size

    recipe, rows = record["recipe"], [row for row in record["tensors"] if "norms" in row]
    say(
        f"[bold]{record['output']}[/bold]  {len(record['models'])} models by {recipe['method']} "
        f"({recipe['sparsifier']}, {recipe['consensus']})"
    )
    for n, label in enumerate(record["models"]):
        norm = math.sqrt(sum(row["norms"][n] ** 2 for row in rows))
        say(f"  {label}: norm of its delta {norm:.4g}")
    merged = math.sqrt(sum(row["norm"] ** 2 for row in rows))
    agreed = [row["agreed"] for row in rows if row["agreed"] is not None]
    say(f"  merged delta: norm {merged:.4g}")
    if agreed:
        say(f"  entries that several change, agreed in sign: {sum(agreed) / len(agreed):.0%}")
    say(
        f"  {duration(record['seconds'])}, peak memory {size(record['peak_memory_bytes'])}; "
        f"record in {where}"
    )
