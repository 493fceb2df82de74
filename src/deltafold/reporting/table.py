"""A table that knows two ways to be shown: on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MOST_WORDS_WIDTH = 24


@dataclass(frozen=True)
class Strong:
    """A cell to stand out: the best of its group, or a total."""

    text: str


Cell = str | Strong


@dataclass
class Table:
    """Rows of cells under a title.

    The first `left` columns hold words, the others numbers; the first `keys` name a row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: list[str] = field(default_factory=list)
    left: int = 1
    keys: int = 1

    def markdown(self) -> str:
        """The table as GitHub Markdown: bold title, table, notes in small print below."""
        rule = [":--" if column < self.left else "--:" for column in range(len(self.columns))]
        lines = [f"**{_escaped(self.title)}**", ""]
        lines += [_line([_escaped(column) for column in self.columns]), _line(rule)]
        lines += [_line([_markdown_cell(cell) for cell in row]) for row in self.rows]
        for note in self.notes:
            lines += ["", _escaped(note)]
        return "\n".join(lines) + "\n"

    def rich(self, width: int) -> list[RichTable]:
        """The table for a rich console of `width` characters, in parts if it is too wide for one.

        The first `keys` columns stand in each part. Cells are plain text, not rich's markup.
        """
        widths = [self._width(column) for column in range(len(self.columns))]
        keys = list(range(max(self.left, self.keys)))
        parts = [list(keys)]
        for column in range(len(keys), len(widths)):
            needed = sum(widths[k] for k in [*parts[-1], column]) + 2
            if len(parts[-1]) > len(keys) and needed > width:
                parts.append(list(keys))
            parts[-1].append(column)
        return [
            self._rich_part(part, part is parts[0], part is parts[-1], widths) for part in parts
        ]

    def _width(self, column: int) -> int:
        """Characters that a column needs: whole numbers, whole words of the heading, a margin."""
        texts = [_text(row[column]) for row in self.rows]
        if column < self.left:  # words may wrap
            texts = [text[:MOST_WORDS_WIDTH] for text in texts]
        return max(map(len, [*texts, *self.columns[column].split(), ""])) + 3

    def _rich_part(self, part: list[int], first: bool, last: bool, widths: list[int]) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(
            title=Text(self.title, style="bold") if first else None,
            caption=Text("\n".join(self.notes)) if last and self.notes else None,
            box=box.SIMPLE_HEAD,
            show_header=any(self.columns),
            title_justify="left",
            caption_justify="left",
        )
        for column in part:
            shown.add_column(
                Text(self.columns[column]),
                justify="left" if column < self.left else "right",
                overflow="fold",
                min_width=widths[column] - 3,
            )
        for row in self.rows:
            cells = [row[column] for column in part]
            shown.add_row(
                *(Text(_text(c), style="bold" if isinstance(c, Strong) else "") for c in cells)
            )
        return shown


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Strong) else cell


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Strong):
        return f"**{_escaped(cell.text)}**" if cell.text else ""  # no bold nothing
    return _escaped(cell)


def _escaped(text: str) -> str:
    """Keep a name from ending its cell or turning into markup."""
    for sign in "\\|*_<`":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
