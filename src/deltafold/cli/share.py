"""`deltafold share`, and `plan` with one of its methods."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import command, record_place
from deltafold.sharing.request import ShareRequest


def show_sharing(found: dict[str, Any]) -> None:
    """What is shared with what, and the count."""
    from deltafold.cli.show import out, say, table

    name = found["method"]["name"]
    say(f"[bold]{found['model']}[/bold]  {name}, {found['method']['matrices']}")
    rows = table(">block", "refers to", ">rank", ">rank of outputs")
    for place in found["places"]:
        anchor = "nothing" if place["anchor"] is None else f"block {place['anchor']}"
        ranks = (str(place[key]) if place[key] else "none" for key in ("rank", "write_rank"))
        rows.add_row(str(place["block"]), anchor, *ranks)
    out.print(rows)
    say(f"  {len(found['places'])} of {found['blocks']} blocks share; {_count(found)}")


def _count(found: dict[str, Any]) -> str:
    from deltafold.cli.show import size

    return (
        f"{found['base_parameters']:,} -> [bold]{found['parameters']:,}[/bold] parameters "
        f"({found['parameter_share']:.1%}), of which {found['delta_parameters']:,} in deltas "
        f"({size(found['delta_parameters'] * 2)} in bf16)"
    )


def _show(result: dict[str, Any], request: ShareRequest) -> None:
    if request.dry_run:
        show_sharing(result)
        return
    where = record_place(request.record, request.output)
    from deltafold.cli.show import device_lines, duration, left_out_lines, say, size
    from deltafold.reporting.units import lowered_text

    blocks = ", ".join(
        f"{p['block']}" + ("" if p["anchor"] is None else f" (of {p['anchor']})")
        for p in result["places"]
    )
    say(f"[bold]{result['output']}[/bold]  {result['method']['name']}, blocks {blocks}")
    say(f"  {_count(result)}")
    say(f"  weights {size(result['base_weight_bytes'])} -> {size(result['weight_bytes'])} on disk")
    if "text" in result and result["settings"]["steps"]:
        text = result["text"]
        said = {
            "self": "the model's own text",
            "pages": "the pages that come with deltafold",
            "general": "the general text of deltafold",
        }
        source = said.get(text["source"], text["source"])
        say(
            f"  trained for {result['steps_done']} steps on {source} ({text['tokens']:,} tokens), "
            f"best at step {result['best_step']}{lowered_text(result['rate_scale'])}; "
            f"{result['tokens_per_second_training']:.0f} tokens/s"
        )
    if "search" in result:
        best = min(result["search"], key=lambda row: row["kl"])
        say(
            f"  {len(result['search'])} settings tried: rate {best['rate']:.2g}, KL share "
            f"{best['kl_share']:.2g}, split {best['split']:.2g}"
        )
    for stage, found in result.get("quality", {}).items():
        kl = f", KL {found['kl']:.3g}" if "kl" in found else ""
        say(f"  {stage}: perplexity {found['perplexity']:.4g}{kl}")
    for row in result.get("scores", ()):
        shares = "".join(
            f"{name} {(found.get('exact_match') or found['accuracy'])['value']:.1%}; "
            for name, found in row["metrics"].get("tasks", {}).items()
        )
        perplexity = row["metrics"].get("perplexity")
        shares += f"perplexity {perplexity['value']:.4g}; " if perplexity else ""
        say(
            f"  {row['label']}: {shares}{row['tokens_per_second']:.0f} tokens/s, weights "
            f"{size(row['weight_bytes'])}"
        )
    for line in [*left_out_lines(result), *device_lines(result)]:
        say(line)
    say(
        f"  {duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}; "
        f"record in {where}"
    )


share = command(ShareRequest, "deltafold.sharing.share:run_share", _show)
