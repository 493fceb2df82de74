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
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="base|union|MODEL",
            help="Whose vocabulary: the base's, all tokens of all, or that of one of the models.",
        ),
    ] = None,
    setting: o.SetOption = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=V,V,...]",
            help="Try values of scale or density, and keep what does best.",
        ),
    ] = None,
    search_on: Annotated[
        list[Path] | None,
        typer.Option(help="What the search chooses by: .jsonl or text. Default: --task, --text."),
    ] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option(help="Rows to score base, models and result on; as evaluate takes them."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to measure perplexity on; as evaluate does.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first rows of a task, and windows of a text.")
    ] = None,
    answers: o.AnswersOption = 4,
    batch_size: o.BatchSizeOption = 8,
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    as_archive: Annotated[
        bool, typer.Option("--as-archive", help="Write an archive on the base, no checkpoint.")
    ] = False,
    archive_method: Annotated[str, typer.Option(help="Codec of that archive.")] = "auto",
    file_ratio: o.FileRatioOption = None,
    nominal_ratio: o.NominalRatioOption = None,
    n_bytes: o.BytesOption = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="TEXT", help="For that archive; as compress takes it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random positions.")] = 0,
    shard_size: o.ShardSizeOption = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers only and show what would be done.")
    ] = False,
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    engine: o.EngineOption = "threads",
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Merge several fine-tunes of one base into one ordinary checkpoint, or into an archive.

    Example: deltafold merge base/ math.delta sql.delta chat/ -o merged/ --method ties
    """
    from deltafold.cli.show import progress
    from deltafold.running.devices import computing

    base, recipe = _recipe(
        base, models or [], config, method, sparsify, consensus, weight, density, scale, setting,
        tokenizer,
    )  # fmt: skip
    budget = {
        "file_ratio": file_ratio,
        "nominal_ratio": nominal_ratio,
        "n_bytes": o.parse_bytes(n_bytes, "--bytes"),
    }
    wanted = _archive_options(as_archive, archive_method, budget, calibration)
    searched = _searched(search)
    arguments: dict[str, Any] = {
        "seed": seed,
        "shard_bytes": int(o.parse_bytes(shard_size, "--shard-size") or 0),
        "dry_run": dry_run,
        "overwrite": overwrite,
        "restart": restart,
        "workers": workers,
        "memory_bytes": o.parse_bytes(memory, "--memory"),
        "engine": engine,
        "record": record,
    }
    with progress() as advance, computing(device):
        arguments["progress"] = advance
        if task or text or search_on or searched is not None or wanted is not None:
            from deltafold.merging.choosing import merge as scored_merge

            arguments |= {
                "search": searched,
                "search_on": search_on or (),
                "tasks": task or (),
                "texts": text or (),
                "limit": limit,
                "answers": answers,
                "batch_size": batch_size,
                "dtype": dtype,
                "device": device,
                "as_archive": wanted,
            }
            result = scored_merge(base, recipe, output, **arguments)
        else:  # nothing is run: no need to import what runs models
            from deltafold.merging.merge import merge as merge_verb

            result = merge_verb(base, recipe, output, **arguments)
    if json_output:
        import json

        print(json.dumps(result))
    else:
        from deltafold.cli.merge_summary import show

        show(result, None if dry_run else o.record_place(record, output))


def _archive_options(
    asked: bool, method: str, budget: dict[str, Any], calibration: str | None
) -> dict[str, Any] | None:
    """What `compress` is given, None for a checkpoint. Raises UsageError."""
    from deltafold.errors import UsageError

    given = {name: value for name, value in budget.items() if value is not None}
    if calibration is not None:
        given["calibration"] = calibration
    if not asked:
        if given or method != "auto":
            raise UsageError("A size, a codec or calibration is for an archive: add --as-archive.")
        return None
    return {"method": method} | given


def _searched(given: list[str] | None) -> dict[str, list[float]] | None:
    """`scale=0.4,0.8` and `density` as a table of values. Raises UsageError."""
    from deltafold.errors import UsageError

    if not given:
        return None
    found: dict[str, list[float]] = {}
    for item in given:
        name, _, values = item.partition("=")
        try:
            found[name] = [float(each) for each in values.split(",") if each.strip()]
        except ValueError:
            raise UsageError(f"--search {item!r} is not like scale=0.4,0.8,1.") from None
    return found


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
    tokenizer: str | None,
) -> tuple[str, Recipe]:
    """(base, recipe) of a file, or of the command line. Raises UsageError."""
    from dataclasses import replace

    from deltafold.errors import UsageError
    from deltafold.merging.recipe import Model, Recipe
    from deltafold.merging.recipe_files import read_recipe

    if config is not None:
        if base is not None or models:
            raise UsageError("--config names base and models; drop them from the command line.")
        found, recipe = read_recipe(config)
        return found, replace(recipe, tokenizer=tokenizer) if tokenizer else recipe
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
        tokenizer,
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
