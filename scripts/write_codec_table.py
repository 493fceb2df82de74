"""Write the table of docs/codecs.md from `deltafold methods --json`.

    python scripts/write_codec_table.py

The table stands between two markers; the rest of the page is written by hand. A test holds the page
against what this script would write.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "codecs.md"
BEGIN, END = "<!-- codecs:begin -->", "<!-- codecs:end -->"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table, a row a codec; those that can be asked for as a method first."""
    lines = [
        "| codec | what it is | gives back | bits per weight | source |",
        "|:--|:--|:--|--:|:--|",
    ]
    for row in sorted(rows, key=lambda row: (not row["method"], not row["lossy"], row["name"])):
        name = f"[{row['name']}](#{row['name']})"
        bits = "–" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        back = "an approximation" if row["lossy"] else "every bit"
        source = re.sub(
            r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", row["paper"]
        )
        source = re.sub(r"^docs/(\S+)$", r"[\1](\1)", source)
        name += "" if row["method"] else " (by itself)"
        source = "own" if source == "-" else source
        lines.append(f"| {name} | {row['title']} | {back} | {bits} | {source} |")
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table between its markers. Raises ValueError if a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{begin}\n\n{table(rows)}\n\n{end}{after}"


def main() -> None:
    command = [sys.executable, "-m", "deltafold", "methods", "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    page = with_table(PAGE.read_text(encoding="utf-8"), rows)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
