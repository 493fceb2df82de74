"""Write the table of options into the page of each verb, from its request.

python scripts/write_option_tables.py           # after an option has changed
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from deltafold.running.front import options_table

DOCS = Path(__file__).parents[1] / "docs" / "commands"
EVERYWHERE = (
    "| `--settings` | | | A YAML or TOML file of options, by their names; those given win. |\n"
    "| `--json` | | | Print JSON and nothing else. |\n"
)
BEGIN, END = "<!-- options:begin -->", "<!-- options:end -->"
REQUESTS = {
    "compress": "deltafold.compressing.request:CompressRequest",
    "restore": "deltafold.restoring.request:RestoreRequest",
    "verify": "deltafold.restoring.request:VerifyRequest",
    "export": "deltafold.exporting.request:ExportRequest",
    "merge": "deltafold.merging.request:MergeRequest",
    "fold": "deltafold.folding.request:FoldRequest",
    "share": "deltafold.sharing.request:ShareRequest",
    "factor": "deltafold.factoring.request:FactorRequest",
}


def page_with_table(name: str) -> str:
    """The page of a verb with its table as it must be; at the end where the page has none yet."""
    module, _, kind = REQUESTS[name].partition(":")
    table = options_table(getattr(import_module(module), kind)) + EVERYWHERE
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## All options\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write all pages."""
    for name in REQUESTS:
        (DOCS / f"{name}.md").write_text(page_with_table(name), encoding="utf-8")


if __name__ == "__main__":
    main()
