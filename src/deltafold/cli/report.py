"""`deltafold report`: tables and figures from the records of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltafold.cli import options as o


def report(
    records: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD...",
            help="Records (JSON), or what they lie beside: an archive, a folder with record.json.",
            show_default=False,
        ),
    ],
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables to this file.", show_default=False)
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw PNG figures into this folder.", show_default=False)
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write one HTML page, to be opened in a browser; needs no network.",
            show_default=False,
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Put the tables into this Markdown file.", show_default=False),
    ] = None,
    marker: Annotated[
        str | None,
        typer.Option(
            help="Where in --into: between <!-- MARKER:begin --> and <!-- MARKER:end -->.",
            show_default=False,
        ),
    ] = None,
    dark: Annotated[
        bool, typer.Option("--dark", help="Figures on a dark ground, as NAME-dark.png.")
    ] = False,
    json_output: o.JsonOption = False,
) -> None:
    """Show what runs did, as tables and figures drawn from their records.

    Takes the records of compress, fold, share, factor, evaluate, restore, verify, plan and of
    benchmarks. Tables go to the terminal; --markdown and --into write them as Markdown, --figures
    draws, --page makes a page to look at.
    """
    from deltafold.cli.show import out
    from deltafold.errors import UsageError
    from deltafold.reporting.figures import figures_of
    from deltafold.reporting.markdown import page as markdown_page
    from deltafold.reporting.markdown import rewrite_block, write_text
    from deltafold.reporting.page import write_page
    from deltafold.reporting.records import read_records
    from deltafold.reporting.tables import tables_of

    if (into is None) != (marker is None):
        raise UsageError("--into and --marker belong together; give both or neither.")
    if dark and figures is None:
        raise UsageError("--dark is about figures; give --figures FOLDER with it.")
    known = read_records(records)
    tables = [table for record in known for table in tables_of(record)]
    for table in tables if not json_output else ():
        for part in table.rich(out.width):
            out.print(part)
    drawn = figures_of(known, figures, dark) if figures else []
    if figures and not drawn and not json_output:
        out.print("These records hold nothing that a figure shows.")
    if markdown:
        write_text(markdown, markdown_page(tables, drawn, markdown.parent))
    if into and marker:
        rewrite_block(into, marker, markdown_page(tables))
    if page:
        write_page(known, page)
    written = [*drawn, *filter(None, (markdown, into, page))]
    if json_output:
        import dataclasses
        import json

        rows = [dataclasses.asdict(table) for table in tables]
        print(json.dumps({"tables": rows, "written": list(map(str, written))}, default=str))
        return
    for path in written:
        out.print(f"wrote {path}", markup=False, soft_wrap=True)
