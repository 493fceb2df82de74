"""What `report` is asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltafold.errors import UsageError
from deltafold.running.request import OUTPUT, Request, argument, asked, option


@asked
class ReportRequest(Request):
    """Show what runs did, as tables and figures drawn from their records.

    Takes the records of compress, fold, share, factor, evaluate, restore, verify, plan and of
    benchmarks. Returns the tables as rows, and the files written. Raises DeltafoldError naming the file.

    Example: deltafold report math.delta --figures figures/ --page math.html
    """

    records: Sequence[str | Path] | str | Path = argument(
        "Records (JSON), or what they lie beside: an archive, a folder with record.json.",
        kw_only=False, metavar="RECORD",
    )  # fmt: skip
    markdown: str | Path | None = option(
        "Write the tables to this file.", default=None, panel=OUTPUT
    )
    figures: str | Path | None = option(
        "Draw PNG figures into this folder.", default=None, panel=OUTPUT
    )
    dark: bool = option("Figures on a dark ground, as NAME-dark.png.", default=False, panel=OUTPUT)
    page: str | Path | None = option(
        "Write one HTML page, to be opened in a browser; needs no network.",
        default=None, panel=OUTPUT,
    )  # fmt: skip
    into: str | Path | None = option(
        "Put the tables into this Markdown file.", default=None, panel=OUTPUT
    )
    marker: str | None = option(
        "Where in --into: between <!-- MARKER:begin --> and <!-- MARKER:end -->.",
        default=None, panel=OUTPUT,
    )  # fmt: skip

    def check(self) -> None:
        """Raises UsageError."""
        if (self.into is None) != (self.marker is None):
            raise UsageError("--into and --marker belong together; give both or neither.")
        if self.dark and self.figures is None:
            raise UsageError("--dark is about figures; give --figures FOLDER with it.")

    @property
    def paths(self) -> list[Path]:
        """The records, of which one may be given alone."""
        if isinstance(self.records, str | Path):
            return [Path(self.records)]
        return [Path(each) for each in self.records]
