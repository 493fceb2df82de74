"""`deltafold factor`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command, record_place
from deltafold.factoring.request import FactorRequest


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


def _show(result: dict[str, Any], request: FactorRequest) -> None:
    _show_plan(result)
    if request.dry_run:
        return
    where = record_place(request.record, request.output)
    from deltafold.cli.show import device_lines, duration, left_out_lines, say, size

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
    for line in [*left_out_lines(result), *device_lines(result)]:
        say(line)
    say(
        f"  {duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}; "
        f"record in {where}"
    )


factor = command(FactorRequest, "deltafold.factoring.factor:run_factor", _show)
