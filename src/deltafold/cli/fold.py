"""`deltafold fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.cli import options as o


def fold(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint: folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="See docs/commands/fold.md for all.")
    ] = "auto",
    blocks: Annotated[int | None, typer.Option("--blocks", "-n", help="Blocks that go.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="Share of all parameters to keep, instead of --blocks.")
    ] = None,
    similarity: Annotated[
        str | None, typer.Option(help="How alike states are: cosine, angular, cka, npib, ...")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="Which go: adjacent-pairs, contiguous, lowest, greedy, ...")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="What stays instead: drop, average, replace-me, ...")
    ] = None,
    protect: Annotated[str | None, typer.Option(help="Blocks to leave alone, e.g. 0,1,-1.")] = None,
    closed_form: Annotated[
        str | None,
        typer.Option(help="Heal by least squares: none, at each cut, or through the rest."),
    ] = None,
    heal: Annotated[
        int, typer.Option(help="Steps of training what is left towards the model.")
    ] = 0,
    calibration: Annotated[
        str, typer.Option(help="Text: a file, datasets:NAME, pages, self, or none.")
    ] = "pages",
    samples: Annotated[int, typer.Option(help="Samples of the text, at most.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a sample, at most.")] = 128,
    pool: Annotated[
        str, typer.Option(help="A sample's state: of its last token, or mean.")
    ] = "last",
    seed: Annotated[int, typer.Option(help="Seed of random choices.")] = 0,
    quantize: Annotated[
        str | None, typer.Option(help="Then quantise the weights by torchao: int8 or int4.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="Text for perplexity and KL, not that of --calibration.")
    ] = None,
    explain: Annotated[
        Path | None, typer.Option(help="Folder for similarities, manifold and merges.")
    ] = None,
    task: o.TaskOption = None,
    limit: o.LimitOption = None,
    answers: o.AnswersOption = 4,
    batch_size: o.BatchSizeOption = 8,
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go; read headers only.")
    ] = False,
    shard_size: o.ShardSizeOption = "5GB",
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Fold alike blocks of one model: an ordinary checkpoint with fewer of them.

    Example: deltafold fold smollm2/ -o smaller/ --blocks 6
    """
    from deltafold.cli.show import progress
    from deltafold.running.devices import computing

    scoring: dict[str, Any] = {}
    verb: Any  # the two take the same, one a little more
    if task:
        from deltafold.folding.scored import fold as scored_fold

        verb = scored_fold
        scoring = {
            "tasks": task,
            "limit": limit,
            "answers": answers,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": device,
        }
    else:  # nothing is answered: no need to import what loads whole models
        from deltafold.folding.fold import fold as plain_fold

        verb = plain_fold
    with progress() as advance, computing(device):
        result = verb(
            model,
            output,
            method,
            blocks=blocks,
            parameters=parameters,
            similarity=similarity,
            selection=selection,
            rule=rule,
            protect=block_numbers(protect),
            closed_form=closed_form,
            heal=heal,
            calibration=calibration,
            samples=samples,
            max_tokens=max_tokens,
            pool=pool,
            seed=seed,
            quantize=quantize,
            measure=measure,
            explain=explain,
            dry_run=dry_run,
            shard_bytes=int(o.parse_bytes(shard_size, "--shard-size") or 0),
            overwrite=overwrite,
            restart=restart,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            progress=advance,
            record=record,
            **scoring,
        )
    if json_output:
        import json

        print(json.dumps(result))
    elif dry_run:
        _show_plan(result)
    else:
        _show(result, o.record_place(record, output))


def block_numbers(text: str | None) -> list[int]:
    """`0,1,-1` as numbers. Raises UsageError.

    >>> block_numbers("0, 1,-1")
    [0, 1, -1]
    """
    from deltafold.errors import UsageError

    try:
        return [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise UsageError(
            f"--protect {text!r} names no blocks; write their numbers, like 0,1,-1."
        ) from None


def _method(result: dict[str, Any]) -> str:
    method = result["method"]
    if "rule" not in method:
        return str(method["name"])
    return f"{method['name']} ({method['similarity']}, {method['selection']}, {method['rule']})"


def _show_plan(result: dict[str, Any]) -> None:
    from deltafold.cli.show import say

    asked = result["asked"]
    say(f"[bold]{result['model']}[/bold]  {_method(result)}")
    what = "attention and MLP of blocks go"
    if asked["blocks"] is not None:
        what = f"{asked['blocks']} of {result['blocks']} blocks go"
        what += f": {asked['layer_share']:.1%} of layers"
    say(f"  {what}, {asked['parameter_share']:.1%} of {result['parameters']:,} parameters")


def _show(result: dict[str, Any], where: str) -> None:
    from deltafold.cli.show import device_lines, duration, say, size
    from deltafold.reporting.units import lowered_text

    removed = result["removed"]
    say(f"[bold]{result['output']}[/bold]  {_method(result)}")
    say(
        f"  {len(removed['blocks'])} of {result['blocks']} blocks gone "
        f"({removed['layer_share']:.1%} of layers, {removed['parameter_share']:.1%} of parameters): "
        + (", ".join(map(str, removed["blocks"])) or "none")
    )
    for step in result["steps"]:
        if step.get("ratio") is not None:
            gone = ", ".join(map(str, step["gone"]))
            say(f"  block {gone} folded into {step['kept']}, which keeps {step['ratio']:.2f}")
    if result["silenced"]:
        parts = ", ".join(f"{row['part']} of {row['block']}" for row in result["silenced"])
        say(
            f"  silent, but still stored ({result['silenced_parameter_share']:.1%} of parameters): "
            f"{parts}"
        )
    healed = [row for row in result["patches"] if row["kept"]]
    if result["patches"]:
        say(f"  {len(healed)} of {len(result['patches'])} least-squares patches kept")
    if "healing" in result:
        healing = result["healing"]
        first, best = healing["exams"][0]["kl"], min(each["kl"] for each in healing["exams"])
        say(
            f"  trained for {healing['steps']} steps, best at step {healing['best_step']}: held-out "
            f"KL {first:.3g} -> {best:.3g}{lowered_text(healing['rate_scale'])}"
        )
    for stage, found in result["quality"].items():
        kl = f", KL {found['kl']:.3g}" if "kl" in found else ""
        say(f"  {stage}: perplexity {found['perplexity']:.4g}{kl}")
    for row in result.get("scores", ()):
        shares = ", ".join(
            f"{name} {(found.get('exact_match') or found['accuracy'])['value']:.1%}"
            for name, found in row["metrics"]["tasks"].items()
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
