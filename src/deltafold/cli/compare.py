"""`deltafold compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltafold.cli.command import command
from deltafold.comparing.request import CompareRequest

if TYPE_CHECKING:
    from deltafold.comparing.compare import Answers, OpenPage


def _show(found: Answers | OpenPage, _: CompareRequest) -> None:
    from deltafold.cli.show import duration, out, say, size
    from deltafold.comparing.compare import OpenPage

    if isinstance(found, OpenPage):
        say(f"[bold]{found.url}[/bold]  Ctrl-C ends it.")
        return
    for number, (prompt, answer) in enumerate(found):
        if number % len(found.trio.sizes) == 0:
            out.print("\n" * bool(number) + prompt, style="bold", markup=False, soft_wrap=True)
        say(
            f"\n  [bold]{answer.name}[/bold]  {size(answer.n_bytes)}, {answer.tokens} tokens in "
            f"{duration(answer.seconds)}"
        )
        for line in answer.text.strip("\n").splitlines() or ["(nothing)"]:
            out.print(f"    {line}", markup=False, soft_wrap=True)
    out.print()
    sizes = found.trio.sizes
    say(
        f"The archive is {size(sizes['restored'])} in place of "
        f"{size(sizes['fine-tune'])}: {found.trio.file_ratio:.1f}x smaller."
    )


def _plain(found: Answers | OpenPage) -> Any:
    return found.to_json()


def _after(found: Answers | OpenPage, _: CompareRequest) -> None:
    from deltafold.comparing.compare import OpenPage

    if isinstance(found, OpenPage):
        found.stay()


compare = command(
    CompareRequest, "deltafold.comparing.compare:run_compare", _show, plain=_plain, after=_after
)
