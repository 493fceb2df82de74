"""`report`: tables and figures from the records of runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.reporting.figures import figures_of
from deltafold.reporting.markdown import page as markdown_page
from deltafold.reporting.markdown import rewrite_block, write_text
from deltafold.reporting.page import write_page
from deltafold.reporting.records import read_records
from deltafold.reporting.request import ReportRequest
from deltafold.reporting.table import Table
from deltafold.reporting.tables import tables_of
from deltafold.running.front import front


@dataclass(frozen=True)
class Reported:
    """The tables of all records, and the files that were written."""

    tables: list[Table]
    written: list[Path]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        rows = [dataclasses.asdict(table) for table in self.tables]
        return {"tables": rows, "written": list(map(str, self.written))}


def run_report(request: ReportRequest) -> Reported:
    """Read the records, write what is asked for. Raises DeltafoldError."""
    known = read_records(request.paths)
    tables = [table for record in known for table in tables_of(record)]
    drawn = figures_of(known, Path(request.figures), request.dark) if request.figures else []
    files = []
    if request.markdown:
        files.append(Path(request.markdown))
        write_text(files[-1], markdown_page(tables, drawn, files[-1].parent))
    if request.into and request.marker:
        files.append(Path(request.into))
        rewrite_block(files[-1], request.marker, markdown_page(tables))
    if request.page:
        files.append(Path(request.page))
        write_page(known, files[-1])
    return Reported(tables, [*drawn, *files])


def reported(request: ReportRequest) -> dict[str, Any]:
    """As `run_report`, in plain values."""
    return run_report(request).to_json()


report = front("report", ReportRequest, reported)
