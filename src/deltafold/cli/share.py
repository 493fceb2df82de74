"""`deltafold share`, and `plan` with one of its methods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from deltafold.cli import options as o
from deltafold.running.request import parse_numbers

SHARING = ("deltallm", "no-anchor", "drop-mlp", "tie")

SharedOption = Annotated[
    int | None, typer.Option("--shared", "-n", help="Blocks that refer to another.")
]
RankOption = Annotated[int | None, typer.Option("--rank", "-r", help="Rank of each delta matrix.")]
ParametersOption = Annotated[
    float | None, typer.Option(help="Share of all parameters to keep, e.g. 0.88.")
]
PlacementOption = Annotated[
    str, typer.Option(help="Which blocks: alternating, sequential, or searched by what each costs.")
]
MatricesOption = Annotated[str, typer.Option(help="What of a block: mlp, attention or both.")]
ProtectOption = Annotated[str, typer.Option(help="Blocks to leave alone.")]
SplitOption = Annotated[
    float, typer.Option(help="Rank of down and output projections over that of the others.")
]

ScaleOption = Annotated[
    bool | None,
    typer.Option(
        help="Scale each row of an anchor by a number of its own. Default: unless --rank is given.",
        show_default=False,
    ),
]


def share(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint: folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="deltallm; or a control: no-anchor, drop-mlp, tie."),
    ] = "deltallm",
    parameters: ParametersOption = None,
    shared: SharedOption = None,
    rank: RankOption = None,
    placement: PlacementOption = "alternating",
    matrices: MatricesOption = "mlp",
    protect: ProtectOption = "0,1,-2,-1",
    split: SplitOption = 1.0,
    scale: ScaleOption = None,
    start: Annotated[
        str,
        typer.Option(help="Deltas begin as: svd, activation (whitened by inputs), fit, or zero."),
    ] = "svd",
    align: Annotated[
        bool, typer.Option("--align", help="First put neurons in the order of the anchor's.")
    ] = False,
    train: Annotated[
        str | None,
        typer.Option(help="Text to train on: a file, datasets:NAME, pages, or self (default)."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training; 0: none.")] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate, at its highest.")] = 5e-4,
    batch: Annotated[int, typer.Option(help="Rows of text in a step, all processes together.")] = 8,
    kl_share: Annotated[
        float, typer.Option(help="Share of the loss that is KL from the whole model.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(help="Temperature of that KL.")] = 2.0,
    replace_from: Annotated[
        float, typer.Option(help="Probability at which a module begins to be replaced.")
    ] = 0.3,
    replace_until: Annotated[
        float, typer.Option(help="Share of the steps after which all are replaced.")
    ] = 0.5,
    replace_stagger: Annotated[
        float, typer.Option(help="Share of that time over which modules begin; the deepest first.")
    ] = 0.5,
    patience: Annotated[
        int, typer.Option(help="Stop after so many looks at held-out text without gain; 0: never.")
    ] = 0,
    check_steps: Annotated[
        int, typer.Option(help="Steps between looks at held-out text; then work is saved.")
    ] = 25,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the model in bf16.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory: run each block twice.")
    ] = False,
    tune: Annotated[
        str, typer.Option(help="What is trained: delta, or all weights (two models in memory).")
    ] = "delta",
    search: Annotated[
        int, typer.Option(help="Try so many settings of the training first, by Optuna.")
    ] = 0,
    search_steps: Annotated[
        int | None, typer.Option(help="Steps of each try. Default: a quarter of --steps.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples of text, at most. Default: all; 256 of self.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a row of text.")] = 256,
    measure: Annotated[
        str | None, typer.Option(help="Text for perplexity and KL. Default: held-out rows.")
    ] = None,
    task: o.TaskOption = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to measure before and after, likewise.")
    ] = None,
    limit: o.LimitOption = None,
    batch_size: o.BatchSizeOption = 8,
    dtype: o.DtypeOption = "auto",
    device: o.DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of random choices.")] = 0,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write the ordinary model that results instead.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be shared; read the config only.")
    ] = False,
    shard_size: o.ShardSizeOption = "5GB",
    workers: o.WorkersOption = None,
    memory: o.MemoryOption = None,
    overwrite: o.OverwriteOption = False,
    restart: o.RestartOption = False,
    record: o.RecordOption = None,
    json_output: o.JsonOption = False,
) -> None:
    """Let blocks use earlier blocks' weights plus small deltas, and train the deltas.

    Example: deltafold share smollm2/ -o shared/ --parameters 0.88 --train text.jsonl --steps 500
    """
    from deltafold.cli.show import progress
    from deltafold.running.devices import computing

    verb: Any  # the two take the same, one a little more
    scoring: dict[str, Any] = {}
    if task or text:
        from deltafold.sharing.scored import share as scored_share

        verb = scored_share
        scoring = {
            "tasks": task or [], "texts": text or [], "limit": limit, "batch_size": batch_size,
            "dtype": dtype, "device": device,
        }  # fmt: skip
    else:  # nothing is answered: no need to import what measures whole models
        from deltafold.sharing.share import share as plain_share

        verb = plain_share
    main = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    with progress() as advance, computing(device):
        result = verb(
            model,
            output,
            method,
            parameters=parameters,
            shared=shared,
            rank=rank,
            placement=placement,
            matrices=matrices,
            protect=parse_numbers(protect, "--protect"),
            split=split,
            scale=scale,
            start=start,
            align=align,
            train=train,
            steps=steps,
            rate=rate,
            batch=batch,
            kl_share=kl_share,
            temperature=temperature,
            replace_from=replace_from,
            replace_until=replace_until,
            replace_stagger=replace_stagger,
            patience=patience,
            check_steps=check_steps,
            bf16=bf16,
            recompute=recompute,
            tune=tune,
            search=search,
            search_steps=search_steps,
            samples=samples,
            max_tokens=max_tokens,
            measure=measure,
            seed=seed,
            dense=dense,
            dry_run=dry_run,
            shard_bytes=int(o.parse_bytes(shard_size, "--shard-size") or 0),
            overwrite=overwrite,
            restart=restart,
            workers=workers,
            memory_bytes=o.parse_bytes(memory, "--memory"),
            progress=advance if main else None,
            record=record,
            **scoring,
        )
    if not main:
        return
    if json_output:
        import json

        print(json.dumps(result))
    elif dry_run:
        show_sharing(result)
    else:
        _show(result, o.record_place(record, output))


def plan_share(
    source: str,
    method: str,
    shared: int | None,
    rank: int | None,
    parameters: float | None,
    placement: str,
    matrices: str,
    protect: str,
    split: float,
    scale: bool | None,
    json_output: bool,
) -> None:
    """`deltafold plan CONFIG_OR_MODEL --method deltallm`: exact counts from a config alone."""
    from deltafold.sharing.job import plan_sharing
    from deltafold.sharing.methods.plan import Request, wants_scale

    request = Request(
        method, shared, rank, parameters, placement, matrices, tuple(parse_numbers(protect, "--protect")),
        split, wants_scale(scale, rank),
    )  # fmt: skip
    found = plan_sharing(source, request)
    if json_output:
        import json

        print(json.dumps(found))
        return
    show_sharing(found)


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


def _show(result: dict[str, Any], where: str) -> None:
    from deltafold.cli.show import device_lines, duration, say, size
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
    for line in device_lines(result):
        say(line)
    say(
        f"  {duration(result['seconds'])}, peak memory {size(result['peak_memory_bytes'])}; "
        f"record in {where}"
    )
