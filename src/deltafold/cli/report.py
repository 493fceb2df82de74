"""`deltafold report`: tables and figures from the records of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltafold.cli.command import command
from deltafold.reporting.request import ReportRequest

if TYPE_CHECKING:
    from deltafold.reporting.report import Reported


def _show(found: Reported, request: ReportRequest) -> None:
    from deltafold.cli.show import out

    for table in found.tables:
        for part in table.rich(out.width):
            out.print(part)
    if request.figures and not any(path.suffix == ".png" for path in found.written):
        out.print("These records hold nothing that a figure shows.")
    for path in found.written:
        out.print(f"wrote {path}", markup=False, soft_wrap=True)


def _plain(found: Reported) -> dict[str, Any]:
    return found.to_json()


report = command(ReportRequest, "deltafold.reporting.report:run_report", _show, plain=_plain)
