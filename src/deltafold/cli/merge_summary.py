"""What `deltafold merge` prints of its record."""

from __future__ import annotations

from typing import Any

from deltafold.cli.show import device_lines, duration, left_out_lines, out, say, size


def show(record: dict[str, Any], where: str | None) -> None:
    """The summary. `where` is None for a dry run: nothing was done yet."""
    recipe = record["recipe"]
    say(
        f"[bold]{record['output']}[/bold]  {len(record['models'])} models by {recipe['method']} "
        f"({recipe['sparsifier']}, {recipe['consensus']}), {size(record['output_bytes'])}"
    )
    for note in record["notes"]:
        say(f"  {note}")
    if where is None:
        say(f"  {record['vocabulary']['rows']:,} vocabulary rows; dry run: nothing was written")
        return
    _show_tables(record)
    if "archive" in record:
        totals = record["archive"]
        say(
            f"  archive: {size(totals['archive_bytes'])}, {totals['file_ratio']:.2f}x smaller on disk"
        )
    for line in [*left_out_lines(record), *device_lines(record)]:
        say(line)
    say(
        f"  {duration(record['seconds'])}, peak memory {size(record['peak_memory_bytes'])}; "
        f"record in {where}"
    )


def _show_tables(record: dict[str, Any]) -> None:
    """The tables of the report, without what was said above and below them."""
    from deltafold.reporting.records import MergeRecord
    from deltafold.reporting.tables.merge import merge_tables

    known = MergeRecord.model_validate(record)
    for table in merge_tables(known):
        table.notes.clear()
        for part in table.rich(out.width):
            out.print(part)
