"""`deltafold fold`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command, record_place
from deltafold.folding.request import FoldRequest


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


def _merge_lines(result: dict[str, Any]) -> list[str]:
    """What went into what; nothing for methods that only drop."""
    if not result["method"]["merges"]:
        return []
    protected = result["settings"]["protect"]
    lines = [f"  protected: {', '.join(map(str, protected))}"] if protected else []
    for step in result["steps"]:
        gone = ", ".join(map(str, step["gone"]))
        if step["kept"] is None:
            lines.append(f"  block {gone} dropped: none before it is left to take it in")
            continue
        share = "" if step["ratio"] is None else f", which keeps {step['ratio']:.2f}"
        lines.append(f"  block {gone} folded into {step['kept']}{share}")
    return lines


def _patch_lines(result: dict[str, Any]) -> list[str]:
    """What was fitted into the blocks that are left, or that nothing was."""
    lines = []
    healed = [row for row in result["patches"] if row["kind"] == "heal"]
    for row in result["patches"]:
        if row["kind"] == "scale":
            lines.append(f"  states after block {row['block']} count {row['scale']:.3f} times")
        elif row["kind"] != "heal":
            lines.append(f"  block {row['block']} takes over what was cut, by {row['kind']}")
    if healed:
        kept = sum(row["kept"] for row in healed)
        lines.append(f"  {kept} of {len(healed)} least-squares patches kept")
    if result.get("unhealed_because"):
        lines.append(
            f"  nothing was healed: {result['unhealed_because']}; --steps 30 trains what is left"
        )
    return lines


def _show(result: dict[str, Any], request: FoldRequest) -> None:
    if request.dry_run:
        _show_plan(result)
        return
    where = record_place(request.record, request.output)
    from deltafold.cli.show import device_lines, duration, left_out_lines, say, size
    from deltafold.reporting.units import lowered_text

    removed = result["removed"]
    say(f"[bold]{result['output']}[/bold]  {_method(result)}")
    say(
        f"  {len(removed['blocks'])} of {result['blocks']} blocks gone "
        f"({removed['layer_share']:.1%} of layers, {removed['parameter_share']:.1%} of parameters): "
        + (", ".join(map(str, removed["blocks"])) or "none")
    )
    for line in _merge_lines(result):
        say(line)
    if result["silenced"]:
        parts = ", ".join(f"{row['part']} of {row['block']}" for row in result["silenced"])
        say(
            f"  silent, but still stored ({result['silenced_parameter_share']:.1%} of parameters): "
            f"{parts}"
        )
    for line in _patch_lines(result):
        say(line)
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
    for line in [*left_out_lines(result), *device_lines(result)]:
        say(line)
    say(
        f"  {duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}; "
        f"record in {where}"
    )


fold = command(FoldRequest, "deltafold.folding.fold:run_fold", _show)
