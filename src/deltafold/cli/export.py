"""`deltafold export`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command, record_place
from deltafold.exporting.request import ExportRequest


def _show(result: dict[str, Any], request: ExportRequest) -> None:
    if request.dry_run:
        from deltafold.cli.show import say

        say(f"[bold]{result['archive']}[/bold]  would become {result['to']} on {result['base']}")
        for note in result["notes"]:
            say(f"  note: {note}")
        return
    where = record_place(request.record, request.output)
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


export = command(ExportRequest, "deltafold.exporting.export:run_export", _show)
