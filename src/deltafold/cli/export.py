"""`deltafold export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.cli import options as o


def export(
    archive: o.ArchiveArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder or file to write.")],
    to: Annotated[str, typer.Option("--to", help="peft, or gguf-lora for llama.cpp.")] = "peft",
    base: Annotated[
        str | None, typer.Option("--base", help="The base. Default: the one the archive names.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Components of each delta, at most.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or: as many as hold this share of it, e.g. 0.95.")
    ] = None,
    n_bytes: Annotated[
        str | None, typer.Option("--bytes", help="Or: what keeps most in this size, e.g. 20MB.")
    ] = None,
    rest: Annotated[
        str, typer.Option(help="Norms, embeddings, head: lora, fold (into a base), or drop.")
    ] = "lora",
    engine: Annotated[
        str, typer.Option("--for", help="Keep what this engine takes: peft or vllm.")
    ] = "peft",
    text: Annotated[
        str | None,
        typer.Option(help="Text to fit pairs by and to measure: a file, datasets:NAME, general."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of the text, at most.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a sample, at most.")] = 256,
    device: o.ComputeOption = None,
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Write an archive as a LoRA adapter: for peft, vLLM or llama.cpp.

    Example: deltafold export math.delta --to peft -o math-adapter/ --rank 64
    """
    from deltafold.cli.show import progress
    from deltafold.exporting.export import export as export_verb

    with progress() as advance:
        result = export_verb(
            archive,
            output,
            to,
            base=base,
            rank=rank,
            energy=energy,
            n_bytes=o.parse_bytes(n_bytes, "--bytes"),
            rest=rest,
            engine=engine,
            text=text,
            samples=samples,
            max_tokens=max_tokens,
            overwrite=overwrite,
            restart=restart,
            device=device,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            progress=advance,
            record=record,
        )
    if json_output:
        import json

        print(json.dumps(result))
    else:
        _show(result, o.record_place(record, output))


def _show(result: dict[str, Any], where: str) -> None:
    from deltafold.cli.show import device_lines, duration, say, size

    rows = result["tensors"]
    pairs = [row for row in rows if row["rank"]]
    ranks = [row["rank"] for row in pairs]
    say(
        f"[bold]{result['output']}[/bold]  {size(result['adapter_bytes'])} (archive "
        f"{size(result['archive_bytes'])}, fine-tune {size(result['checkpoint_bytes'])})"
    )
    if ranks:
        spread = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
        origins = {
            "stored": "as the archive stores them",
            "svd": "by SVD",
            "whitened": "by SVD, fitted to the layers' inputs",
        }
        counted = {
            label: sum(row["from"] == key for row in pairs) for key, label in origins.items()
        }
        made = ", ".join(f"{number} {label}" for label, number in counted.items() if number)
        say(f"  {len(pairs)} tensors as pairs of rank {spread}: {made}")
    for how, said in (("whole", "whole"), ("fold", "in the base beside the adapter")):
        if number := sum(row["how"] == how for row in rows):
            say(f"  {number} tensors {said}")
    for why, lost in _left_out(rows).items():
        say(f"  left out: {lost[0]} tensors, {lost[1]:.2%} of the delta ({why})")
    say(
        f"  relative error of the delta: {result['relative_error']:.4f} "
        f"(pairs alone {result['relative_error_of_pairs']:.4f})"
    )
    if "text" in result:
        found = result["text"]
        for label, said in (("adapter", "base + adapter"), ("base", "base alone")):
            say(
                f"  {said}: KL from the restored model {found[label]['kl']:.3g}, agreement "
                f"{found[label]['agreement']:.2%} ({found['tokens']:,} tokens)"
            )
    for note in result["notes"]:
        say(f"  note: {note}")
    if result["for"] == "vllm":
        say(f"  for vLLM: --max-lora-rank {result.get('vllm_max_lora_rank', 8)}")
    for line in device_lines(result):
        say(line)
    say(
        f"  {duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}; "
        f"record in {where}"
    )


def _left_out(rows: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Reason -> (tensors, share of the squared delta) of what the adapter does not hold."""
    total = sum(row["delta_squared"] for row in rows) or 1.0
    found: dict[str, tuple[int, float]] = {}
    for row in rows:
        if row["how"] == "none" or (row["how"] == "pair" and row["why"]):
            share = row["lost_squared"] / total if row["how"] == "none" else 0.0
            number, before = found.get(row["why"], (0, 0.0))
            found[row["why"]] = (number + 1, before + share)
        elif row["how"] == "pair" and not row["rank"] and row["delta_squared"]:
            number, before = found.get("no bytes left", (0, 0.0))
            found["no bytes left"] = (number + 1, before + row["lost_squared"] / total)
    return found
