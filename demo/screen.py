"""What the demo prints: a table that fits one screen, where the picture is, what to try next."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from deltafold.reporting.figures import figures_of
from deltafold.reporting.table import Table
from deltafold.reporting.tables import tables_of
from deltafold.reporting.units import bytes_text, kl_text, percent_text, ratio_text
from deltafold.running.record import Record, read_record

COLUMNS = ("model", "smaller", "bytes", "exact match", "KL from the fine-tune")


def show(path: Path, finetune: str, everything: bool) -> None:
    """Print the record's tables, draw its figures, say where things are and what to try next."""
    record, out = read_record(path), path.parent
    records, tables = [record], [short_table(record, finetune)]
    if everything:
        tables = tables_of(record)
        records.append(read_record(out / "impart-32.delta"))  # for the figures of one archive
    console = Console()
    for table in tables:
        for part in table.rich(console.width):
            console.print(part)
    figures = [f"picture: {figure}" for figure in figures_of(records, out / "figures")]
    written = f"record:  {path}   ({record['seconds']:.0f} s)"
    lossy = [row for row in record["rows"] if row["asked_file_ratio"]]
    archive = out / min(lossy, key=lambda row: abs(row["asked_file_ratio"] - 32))["archive"]
    for line in [*figures, written, "", *what_next(archive, finetune, everything)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def short_table(record: Record, finetune: str) -> Table:
    """The fine-tune, its archives from the largest to the smallest, and the base, one row each."""
    archives = sorted(record["rows"], key=lambda row: row["file_ratio"])
    checkpoint_bytes = archives[0]["file_ratio"] * archives[0]["archive_bytes"]
    known = record["reference"][finetune]
    lines = [
        ("fine-tune", "", bytes_text(checkpoint_bytes), *_quality(known["fine-tune"], None)),
        *(
            (
                row["method"],
                ratio_text(row["file_ratio"]),
                bytes_text(row["archive_bytes"]),
                *_quality(row, row["kl"]),
            )
            for row in archives
        ),
        ("base alone", "", "", *_quality(known["base"], known["base"]["kl"])),
    ]
    notes = [
        f"{record['data'][:1].upper()}{record['data'][1:]}, the same for every line. Bytes: of the "
        "whole archive. After ±: one standard error."
    ]
    return Table(f"The fine-tune {finetune}, restored from its archives", COLUMNS, lines, notes)


def _quality(scores: Record, kl: float | None) -> tuple[str, str]:
    """The cells of exact match and KL; that of the fine-tune from itself is left blank."""
    share = percent_text(scores["exact_match"], scores["exact_match_stderr"])
    return share, "" if kl is None else kl_text(kl, scores["kl_stderr"])


def what_next(archive: Path, finetune: str, everything: bool) -> list[str]:
    """Commands to go on with; first the one without which a shell does not find `deltafold`."""
    bin_folder = Path(sys.prefix, "bin")
    if bin_folder.is_relative_to(Path.cwd()):
        bin_folder = bin_folder.relative_to(Path.cwd())
    activate = bin_folder / "activate"
    missing = shutil.which("deltafold") is None and activate.is_file()
    return [
        "Try next:",
        *([f"  source {activate}"] if missing else []),
        f"  deltafold inspect {archive}",
        f"  deltafold compress demo/models/base demo/models/{finetune} \\",
        "    -o my.delta --file-ratio 32",
        "  deltafold restore my.delta --base demo/models/base -o restored/",
        *([] if everything else ["  make demo OPTIONS=--all   # every method at every size"]),
    ]
