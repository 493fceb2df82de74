"""Write the table of docs/checkpoints.md from the record of the zoo.

    make zoo                             # runs it, writes benchmarks/records/zoo.json
    python scripts/write_zoo_table.py    # the table

The table stands between two markers; the rest of the page is written by hand. Refusals of one kind share
a number. A sentence of no kind is an error: then a kind is to be added here. A test holds the page against
what this script would write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "checkpoints.md", ROOT / "benchmarks" / "records" / "zoo.json"
BEGIN, END = "<!-- zoo:begin -->", "<!-- zoo:end -->"
VERBS = {
    "exact": "exact", "auto": "`auto`", "load": "`load`", "merge": "`merge`", "export": "`export`",
    "fold": "`fold`", "factor": "`factor`", "share": "`share`",
}  # fmt: skip

KINDS = {
    r"The blocks of \S+ differ": "its blocks are of several kinds, and only alike blocks can take "
    "one another's place",
    r"has an encoder and a decoder": "it has two lists of blocks, and `fold` takes models with one",
    r"does not name one number of blocks": "its config names no one number of blocks: it has stages, "
    "or kinds of blocks in a pattern",
    r"holds no list of \d+ blocks": "all its blocks are one block, used several times",
    r"depends on a block's number": "a block computes by its number, and no config can keep that",
    r"has a part for each block": "a tensor outside of the blocks has a part for each, and no text can "
    "show which part is whose",
    r"does not open": "other parts of it count on every block",
    r"no causal language model": "`share` tells blocks apart by the loss on text, and no text can be run "
    "through it",
    r"keeps its experts stacked": "experts are one parameter; attention can be shared "
    "(`--matrices attention`)",
    r"no linear layers of the \w+ that are": "its MLPs are not known by their names, or it has none",
    r"no blocks with linear layers": "there are no linear layers in its blocks",
    r"Nothing of \S+ can go into an adapter": "it has no layer that an adapter can change",
    r"of diffusers|carries no config.json|holds no config.json": "diffusers builds it, and transformers "
    "has no such model",
    r"cannot be met": "kernels of convolutions and tables of positions are stored exactly, and most of "
    "so small a model is such",
}
"""What a refusal's sentence holds -> what the table says of it."""


def kind_of(sentence: str) -> str:
    """The kind of a refusal. Raises ValueError for one of no kind."""
    for pattern, kind in KINDS.items():
        if re.search(pattern, sentence):
            return kind
    raise ValueError(f"no kind of refusal in {Path(__file__).name} has this sentence: {sentence}")


def table(record: dict[str, Any]) -> str:
    """Markdown: what came of every verb, and below it why what was refused was."""
    rows, numbers = record["rows"], dict[str, int]()
    lines = [
        f"| {' | '.join(['architecture', *VERBS.values()])} |",
        f"|:--|{':-:|' * len(VERBS)}",
    ]
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** |{' |' * len(VERBS)}")
        cells = []
        for verb in VERBS:
            said = row["verbs"][verb]
            right = said == "right"
            number = 0 if right else numbers.setdefault(kind_of(said), len(numbers) + 1)
            cells.append("right" if right else f"{number}")
        lines.append(f"| {row['architecture']} | {' | '.join(cells)} |")
    counts = [said == "right" for row in rows for said in row["verbs"].values()]
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    summary = (
        f"{len(rows)} architectures, {sum(counts)} times right, {len(counts) - sum(counts)} times refused "
        f"({packages}). A number is a refusal, and why:"
    )
    reasons = [f"{number}. {kind}." for kind, number in numbers.items()]
    return "\n".join([*lines, "", summary, "", *reasons])


def with_table(page: str, record: dict[str, Any]) -> str:
    """The page with the table between its markers. Raises ValueError if a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{begin}\n\n{table(record)}\n\n{end}{after}"


def main() -> None:
    """Write the page."""
    page = with_table(PAGE.read_text(encoding="utf-8"), json.loads(RECORD.read_text()))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
