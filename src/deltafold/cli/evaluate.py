"""`deltafold evaluate`: base, fine-tune and candidates in one table."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from deltafold.cli import options as o


def evaluate(
    finetuned: Annotated[
        str,
        typer.Argument(
            metavar="FINETUNED", help="The fine-tune: what the others are compared with."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Restored folders, other models, archives."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base; becomes a row of its own. Archives need it."),
    ] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option("--task", help="JSON lines of prompts and answers, or of multiple choice."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="A UTF-8 text for perplexity and KL.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", metavar="TASK,...", help="Tasks of lm-evaluation-harness."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option("--lm-eval-path", metavar="DIR", help="Your own task files for lm-eval."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Write the record to this file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time, at most.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window of text. Default: 512, or the limit of the model.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first rows of a task, and windows of a text.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens generated. Default: those of the longest answer, and 8.",
            show_default=False,
        ),
    ] = None,
    answers: o.AnswersOption = 4,
    dtype: Annotated[
        str, typer.Option(help="auto (the fine-tune's, for all models), fp32, bf16 or fp16.")
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N. Default: cuda if there is one.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure base, fine-tune and candidates under one setting: perplexity, KL, exact match.

    Every model gets the same tokens, dtype, batch size and device. Figures come with standard
    errors. A MODEL is a Hugging Face folder or an archive.
    """
    from rich.console import Console
    from rich.markup import escape

    from deltafold.errors import UsageError
    from deltafold.evaluation import evaluate as measure
    from deltafold.evaluation.table import explanations, rich_table
    from deltafold.running.record import write_record

    if record is not None and not record.parent.is_dir():
        raise UsageError(f"{record.parent} is not a folder; make it, or give another --record.")
    errors = Console(stderr=True)
    status = errors.status("starting") if errors.is_terminal else nullcontext()
    with status as shown:
        found = measure(
            finetuned,
            models or [],
            base=base,
            tasks=task or [],
            texts=text or [],
            lm_eval=[name for names in lm_eval or [] for name in names.split(",") if name],
            lm_eval_path=lm_eval_path,
            batch_size=batch_size,
            max_length=max_length,
            limit=limit,
            max_new_tokens=max_new_tokens,
            answers=answers,
            dtype=dtype,
            device=device,
            report=lambda line: shown.update(escape(line)) if shown else None,
        )
    if record is not None:
        write_record(found, record)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(200, console.width))  # a file or pipe has no edge to wrap at
    console.print(rich_table(found))
    for line in explanations(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
