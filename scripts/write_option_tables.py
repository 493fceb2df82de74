"""Write the table of options into the page of each command, from its request.

python scripts/write_option_tables.py           # after an option has changed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deltafold
from deltafold.cli import app
from deltafold.running.front import options_table
from deltafold.running.request import Request

DOCS = Path(__file__).parents[1] / "docs" / "commands"
IN_PYTHON = {"push": "push_to_hub"}
"""What is called otherwise there."""
EVERYWHERE = {
    "--settings": "A YAML or TOML file of options, by their names; those given win.",
    "--json": "Print JSON and nothing else.",
}
BEGIN, END = "<!-- options:begin -->", "<!-- options:end -->"


def requests() -> dict[str, type[Request]]:
    """The request of every command."""
    commands: list[Any] = [each.callback for each in app.registered_commands]
    return {command.__name__: command.request for command in commands}


def page_with_table(name: str) -> str:
    """The page of a command with its table as it must be; at the end where the page has none yet."""
    public = IN_PYTHON.get(name, name) in deltafold.__all__
    table = options_table(requests()[name], public)
    for flag, words in EVERYWHERE.items():
        table += f"| `{flag}` |{' |' * public} | {words} |\n"
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## All options\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write all pages."""
    for name in requests():
        (DOCS / f"{name}.md").write_text(page_with_table(name), encoding="utf-8")


if __name__ == "__main__":
    main()
