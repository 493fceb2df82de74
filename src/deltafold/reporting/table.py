"""A table that knows two ways to be shown: on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text


@dataclass(frozen=True)
class Strong:
    """A cell to stand out: the best of its group, or a total."""

    text: str


Cell = str | Strong


@dataclass
class Table:
    """Rows of cells under a title. The first `left` columns hold words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: list[str] = field(default_factory=list)
    left: int = 1

    def markdown(self) -> str:
        """The table as GitHub Markdown: bold title, table, notes in small print below."""
        rule = [":--" if column < self.left else "--:" for column in range(len(self.columns))]
        lines = [f"**{_escaped(self.title)}**", ""]
        lines += [_line([_escaped(column) for column in self.columns]), _line(rule)]
        lines += [_line([_markdown_cell(cell) for cell in row]) for row in self.rows]
        for note in self.notes:
            lines += ["", _escaped(note)]
        return "\n".join(lines) + "\n"

    def rich(self) -> RichTable:
        """The table for a rich console. Cells are plain text, not rich's markup."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(
            title=Text(self.title, style="bold"),
            caption=Text("\n".join(self.notes)) if self.notes else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for number, column in enumerate(self.columns):
            words = number < self.left
            shown.add_column(
                Text(column),
                justify="left" if words else "right",
                overflow="fold",
                no_wrap=not words,
            )
        for row in self.rows:
            shown.add_row(*(_rich_cell(cell) for cell in row))
        return shown


def _rich_cell(cell: Cell) -> Text:
    from rich.text import Text

    return Text(cell.text, style="bold") if isinstance(cell, Strong) else Text(cell)


def _markdown_cell(cell: Cell) -> str:
    return f"**{_escaped(cell.text)}**" if isinstance(cell, Strong) else _escaped(cell)


def _escaped(text: str) -> str:
    """Keep a name from ending its cell or turning into markup."""
    for sign in "\\|*_<`":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
