"""`deltafold factor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.cli import options as o


def factor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint: folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="See docs/commands/factor.md for all.")
    ] = "lord",
    parameters: Annotated[float, typer.Option(help="Share of all parameters to keep.")] = 0.8,
    group: Annotated[int, typer.Option(help="basis-sharing: blocks with one basis together.")] = 2,
    grouping: Annotated[
        str, typer.Option(help="basis-sharing: neighbours, or blocks with alike inputs.")
    ] = "neighbours",
    sequential: Annotated[
        bool, typer.Option(help="Fit each block to what the factored ones before it give.")
    ] = True,
    refit: Annotated[
        bool, typer.Option(help="basis-sharing: coefficients fitted to each block's own inputs.")
    ] = True,
    centre: Annotated[
        bool, typer.Option("--centre", help="Keep the mean of outputs by a bias.")
    ] = False,
    damping: Annotated[
        float | None, typer.Option(help="Share of the mean that is added to moments' diagonals.")
    ] = None,
    trials: Annotated[int, typer.Option(help="bolaco: splits that are tried.")] = 24,
    calibration: Annotated[
        str, typer.Option(help="Text: a file, datasets:NAME, pages, self, or none.")
    ] = "pages",
    samples: Annotated[int, typer.Option(help="Samples of the text, at most.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a sample, at most.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of samples and of the search.")] = 0,
    measure: Annotated[
        str | None, typer.Option(help="Text for perplexity and KL, not that of --calibration.")
    ] = None,
    task: o.TaskOption = None,
    limit: o.LimitOption = None,
    batch_size: o.BatchSizeOption = 8,
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write the ordinary model that the factors amount to.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be stored; read headers only.")
    ] = False,
    shard_size: o.ShardSizeOption = "5GB",
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Low-rank factors in place of a model's matrices: fewer parameters at the same depth.

    Example: deltafold factor smollm2/ -o small/ --method lord --parameters 0.8
    """
    from deltafold.cli.show import progress
    from deltafold.running.devices import computing

    more: dict[str, Any] = {} if damping is None else {"damping": damping}
    verb: Any  # the two take the same, one a little more
    if task:
        from deltafold.factoring.scored import factor as scored_factor

        verb = scored_factor
        more |= {"tasks": task, "limit": limit, "batch_size": batch_size, "dtype": dtype,
                 "device": device}  # fmt: skip
    else:  # nothing is answered: no need to import what loads whole models
        from deltafold.factoring.factor import factor as plain_factor

        verb = plain_factor
    with progress() as advance, computing(device):
        result = verb(
            model,
            output,
            method,
            parameters=parameters,
            group=group,
            grouping=grouping,
            sequential=sequential,
            refit=refit,
            centre=centre,
            trials=trials,
            calibration=calibration,
            samples=samples,
            max_tokens=max_tokens,
            seed=seed,
            measure=measure,
            dense=dense,
            dry_run=dry_run,
            shard_bytes=int(o.parse_bytes(shard_size, "--shard-size") or 0),
            overwrite=overwrite,
            restart=restart,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            progress=advance,
            record=record,
            **more,
        )
    if json_output:
        import json

        print(json.dumps(result))
        return
    _show_plan(result)
    if not dry_run:
        _show(result, o.record_place(record, output))


def _show_plan(result: dict[str, Any]) -> None:
    from deltafold.cli.show import out, say, table

    counted, name = result["parameters"], result["method"]["name"]
    say(f"[bold]{result.get('output', result['model'])}[/bold]  {name}")
    if "kept" not in counted:
        say(
            f"  at most {counted['kept_at_most']:,} of {counted['total']:,} parameters stay "
            f"({counted['asked_share']:.1%}); {name} finds ranks by what it measures"
        )
        return
    say(
        f"  {counted['kept']:,} of {counted['total']:,} parameters stay "
        f"({counted['parameter_share']:.1%}), {counted['factorable_share']:.1%} of those in factored "
        f"layers at {counted['rank_share']:.1%} of their rank"
    )
    errors = any("relative_error" in row for row in result["roles"])
    shown = table("role", ">layers", ">rank", ">of rank", ">parameters", ">kept", ">of parameters",
                  *([">error"] if errors else []))  # fmt: skip
    for row in result["roles"]:
        rank = "dense" if row["rank"] is None else "-".join(map(str, dict.fromkeys(row["rank"])))
        cells = [
            row["role"],
            str(row["layers"]),
            rank,
            f"{row['rank_share']:.1%}",
            f"{row['parameters']:,}",
            f"{row['kept']:,}",
            f"{row['parameter_share']:.1%}",
        ]
        shown.add_row(*cells, *([f"{row['relative_error']:.2%}"] if errors else []))
    out.print(shown)


def _show(result: dict[str, Any], where: str) -> None:
    from deltafold.cli.show import device_lines, duration, say, size

    counted = result["parameters"]
    if "bytes" in counted:
        say(f"  weights {size(counted['bytes'])}, {counted['bytes']:,} bytes of tensors")
    found = result["search"]
    if "trials" in found:
        best = found["trials"][found["chosen"]]
        shares = ", ".join(f"{group} {share:.0%}" for group, share in best["shares"].items())
        say(f"  best of {len(found['trials'])} splits: {shares}")
    for stage, row in result["quality"].items():
        kl = f", KL {row['kl']:.3g}, agreement {row['agreement']:.1%}" if stage != "model" else ""
        say(f"  {stage}: perplexity {row['perplexity']:.4g}{kl}")
    for row in result.get("scores", ()):
        shares = ", ".join(
            f"{name} {(each.get('exact_match') or each['accuracy'])['value']:.1%}"
            for name, each in row["metrics"]["tasks"].items()
        )
        say(
            f"  {row['label']}: {shares}; {row['tokens_per_second']:.0f} tokens/s, weights "
            f"{size(row['weight_bytes'])}"
        )
    for line in device_lines(result):
        say(line)
    say(
        f"  {duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}; "
        f"record in {where}"
    )
