"""`deltafold compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.cli import options as o


def compress(
    base: o.BaseArgument,
    finetuned: o.FinetunedArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Archive folder to write.")],
    method: o.MethodOption = "auto",
    file_ratio: o.FileRatioOption = None,
    nominal_ratio: o.NominalRatioOption = None,
    n_bytes: o.BytesOption = None,
    beta: o.BetaOption = None,
    c: o.COption = None,
    value_dtype: o.ValueDtypeOption = None,
    setting: o.SetOption = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "--text",
            metavar="TEXT",
            help="Text that shows what errors cost, and KL is measured on: JSONL of prompts (and "
            "answers), plain text, datasets:NAME, self (the fine-tune writes it), general (comes "
            "with deltafold; what auto takes by default) or none.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples, at most.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a calibration sample.")] = 256,
    kl_at_most: Annotated[
        float | None,
        typer.Option(
            help="Instead of a size: the smallest archive whose KL to the fine-tune stays at or "
            "below this many nats a token."
        ),
    ] = None,
    distill: Annotated[
        int,
        typer.Option(metavar="STEPS", help="Train what is stored against the fine-tune's outputs."),
    ] = 0,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="auto: the same relative step everywhere, whatever it costs."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random positions.")] = 0,
    no_fallback: Annotated[
        bool,
        typer.Option(
            "--no-fallback", help="Force the method also on tensors that it does not suit."
        ),
    ] = False,
    task: Annotated[
        list[Path] | None,
        typer.Option(help="Rows that base, fine-tune and archive answer; as evaluate takes them."),
    ] = None,
    limit: o.LimitOption = None,
    answers: o.AnswersOption = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers only and show what would be done.")
    ] = False,
    device: o.ComputeOption = None,
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    engine: o.EngineOption = "threads",
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Compress a fine-tuned checkpoint against its base into an archive.

    Example: deltafold compress base/ math/ -o math.delta --file-ratio 64
    """
    settings = o.method_options(beta, c, value_dtype, setting)
    if uniform:
        settings["uniform"] = True
    budget = {
        "file_ratio": file_ratio,
        "nominal_ratio": nominal_ratio,
        "n_bytes": o.parse_bytes(n_bytes, "--bytes"),
    }
    if dry_run:
        from deltafold.cli.plan import show_plan

        show_plan(base, finetuned, method, budget, settings, json_output)
        return
    from deltafold.cli.show import progress
    from deltafold.compressing.choosing import compress as compress_verb

    with progress() as advance:
        result = compress_verb(
            base,
            finetuned,
            output,
            method,
            calibration=calibration,
            samples=samples,
            max_tokens=max_tokens,
            kl_at_most=kl_at_most,
            tasks=task or (),
            limit=limit,
            answers=answers,
            distill=distill,
            **budget,
            seed=seed,
            fallback=not no_fallback,
            overwrite=overwrite,
            restart=restart,
            device=device,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            engine=engine,
            progress=advance,
            record=record,
            **settings,
        )
    if json_output:
        import json

        print(json.dumps(result))
    else:
        _show(result, o.record_place(record, output))


def _show(record: dict[str, Any], where: str) -> None:
    from collections import Counter

    from deltafold.cli.show import device_lines, duration, say, size

    totals, budget = record["totals"], record["budget"]
    say(
        f"[bold]{record['archive']}[/bold]  {size(totals['checkpoint_bytes'])} -> "
        f"[bold]{size(totals['archive_bytes'])}[/bold], "
        f"[bold]{totals['file_ratio']:.2f}x[/bold] smaller on disk, everything counted"
    )
    if budget["asked"] is not None:
        kind = budget["kind"].replace("_", " ")
        got = "nothing to approximate" if budget["got"] is None else f"got {_number(budget['got'])}"
        say(f"  {kind}: asked {_number(budget['asked'])}, {got}")
        if (
            budget["kind"] != "bytes"
            and budget["got"] is not None
            and budget["got"] > 1.01 * budget["asked"]
        ):
            say("  smaller than asked: this method has no use for more bytes here")
    if budget["kind"] != "nominal_ratio" and totals["nominal_ratio"]:
        say(f"  nominal ratio, as papers count: {totals['nominal_ratio']:.1f}")
    codecs = Counter(row["codec"] for row in record["tensors"])
    say("  tensors: " + ", ".join(f"{n} {codec}" for codec, n in codecs.most_common()))
    for tried in record.get("tried", []):
        named = ", ".join(
            f"{'C' if k == 'c' else k.replace('_', ' ')} {v:g}"
            for k, v in tried["settings"].items()
        )
        kept = "  <- kept" if tried.get("kept") else ""
        say(f"  {named}: {tried['criterion']} {tried['value']:.4g}{kept}")
    if why := record.get("calibration", {}).get("why"):
        say(f"  all values count alike: {why}")
    if trained := record.get("distill"):
        say(
            f"  distilled {trained['steps']} steps: KL on samples held out "
            f"{trained['kl_before']:.4g} -> {trained['kl_after']:.4g}; kept: {trained['kept']}"
        )
    for row in record.get("scores", []):
        shares = ", ".join(
            f"{name} {(found.get('exact_match') or found['accuracy'])['value']:.1%}"
            for name, found in row["metrics"]["tasks"].items()
        )
        say(f"  {row['label']}: {shares}")
    for line in device_lines(record):
        say(line)
    say(
        f"  {duration(record['seconds'])}, peak memory {size(record['peak_memory_bytes'])}; "
        f"record in {where}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
