"""`deltafold compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltafold.cli import options as o

if TYPE_CHECKING:
    from deltafold.comparing import Trio


def compare(
    base: o.BaseArgument,
    finetuned: o.FinetunedArgument,
    archive: o.ArchiveArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Answer this in the terminal, without a page.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the fine-tune's chat template.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (each model's own), fp32, bf16 or fp16.")
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N. Default: cuda if there is one.", show_default=False
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Of the page. Default: the first free one from 7860.", show_default=False
        ),
    ] = None,
    json_output: o.JsonOption = False,
) -> None:
    """Ask base, fine-tune and what an archive restores the same thing, side by side.

    Opens a page on this machine (needs deltafold[compare]); --prompt answers in the terminal.

    Example: deltafold compare base/ math/ math.delta --prompt "12 + 7 ="
    """
    from deltafold.cli.show import say
    from deltafold.comparing import Trio
    from deltafold.errors import UsageError

    if json_output and not prompt:
        raise UsageError("--json is for answers; give a --prompt with it.")
    with Trio(base, finetuned, archive, dtype=dtype, device=device) as trio:
        if prompt:
            _answer(trio, prompt, max_new_tokens, chat, json_output)
            return
        from deltafold.comparing.page import serve

        page, url = serve(trio, Path(archive).name, port, wait=False)
        say(f"[bold]{url}[/bold]  Ctrl-C ends it.")
        page.block_thread()


def _answer(
    trio: Trio, prompts: list[str], max_new_tokens: int, chat: bool, json_output: bool
) -> None:
    from dataclasses import asdict

    from deltafold.cli.show import duration, out, say, size

    if json_output:
        import json

        rows = [
            {"prompt": text} | asdict(answer)
            for text in prompts
            for answer in trio.ask(text, max_new_tokens, chat)
        ]
        print(json.dumps(rows))
        return
    for text in prompts:
        out.print(text, style="bold", markup=False, soft_wrap=True)
        for answer in trio.ask(text, max_new_tokens, chat):
            say(
                f"\n  [bold]{answer.name}[/bold]  {size(answer.n_bytes)}, {answer.tokens} tokens in "
                f"{duration(answer.seconds)}"
            )
            lines = answer.text.strip("\n").splitlines() or ["(nothing)"]
            for line in lines:
                out.print(f"    {line}", markup=False, soft_wrap=True)
        out.print()
    say(
        f"The archive is {size(trio.sizes['restored'])} in place of "
        f"{size(trio.sizes['fine-tune'])}: {trio.file_ratio:.1f}x smaller."
    )
