"""Records of parts of a benchmark, run side by side, as one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltafold.errors import UsageError
from deltafold.running.record import Record


def join(
    record: Record, files: Sequence[Path], key: Callable[[Record], Any], same: Sequence[str]
) -> None:
    """Take in what other records have and this one lacks; `key` tells one row from another.

    Raises UsageError for a record that differs in a field of `same`.
    """
    for file in files:
        other = json.loads(file.read_text(encoding="utf-8"))
        for name in same:
            if other[name] != record[name]:
                raise UsageError(f"{file} has {name} {other[name]}, not {record[name]}.")
        record["whole"] = record["whole"] or other["whole"]
        for name in ("machine", "text"):
            if name in other:
                record.setdefault(name, other[name])
        known = {key(row) for row in record["rows"]}
        record["rows"] += [row for row in other["rows"] if key(row) not in known]
