"""The record of a frontier run while it grows: what it has, what it lacks, written after each row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import Cell

from deltafold.codecs import get
from deltafold.errors import DeltafoldError
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record


class StaleRecordError(DeltafoldError):
    """The record was made with other settings, or by other code, than those asked for now."""


def named(cell: Cell, finetune: str) -> Record:
    """The columns that name a cell, and what it is measured with."""
    return {
        "finetune": finetune,
        "method": cell.method,
        "asked_file_ratio": cell.file_ratio,
        "seed": cell.seed,
        "codec_version": get(cell.method).version,
        "calibration": cell.calibration.name if cell.calibration else None,
    }


@dataclass
class Ledger:
    """A record and the file that it is kept in."""

    path: Path
    record: Record

    @classmethod
    def open(cls, path: Path, title: str, model: str, settings: Record) -> Ledger:
        """Go on with the record that is there, or begin one."""
        record: Record = {
            "record_version": RECORD_VERSION,
            "kind": "frontier",
            "title": title,
            "model": model,
            "data": {},
            "relative_delta_norm": {},
            "reference": {},
            "rows": [],
            "settings": settings,
            "seconds": 0.0,
            "peak_memory_bytes": 0,
        }
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, record | {"machine": machine() | {"threads": torch.get_num_threads()}})

    def join(self, paths: Iterable[Path]) -> None:
        """Take in the rows of other records of the same benchmark, scored alike; write the record.

        A row that is here already is replaced. Raises StaleRecordError.
        """
        for path in paths:
            other: Record = json.loads(path.read_text(encoding="utf-8"))
            self.check(other["settings"])
            for name, norm in other["relative_delta_norm"].items():
                self.check_finetune(name, norm)
            held = {_key(row): row for row in self.rows} | {_key(r): r for r in other["rows"]}
            self.record["rows"] = list(held.values())
            for key in ("data", "relative_delta_norm", "reference"):
                self.record[key] |= other[key]
            self.record["seconds"] += other["seconds"]
            peaks = (each["peak_memory_bytes"] for each in (self.record, other))
            self.record["peak_memory_bytes"] = max(peaks)
        write_record(self.record, self.path)

    @property
    def rows(self) -> list[Record]:
        return list(self.record["rows"])

    def forget(
        self, finetunes: Iterable[str], methods: Iterable[str], ratios: Iterable[float]
    ) -> None:
        """Drop the rows of these; base and fine-tune too where no row is left beside them."""
        names = set(finetunes)
        these: dict[str, set[Any]] = {
            "finetune": names,
            "method": set(methods),
            "asked_file_ratio": set(ratios),
        }
        self.record["rows"] = [
            row for row in self.rows if not all(row[key] in them for key, them in these.items())
        ]
        for name in names - {row["finetune"] for row in self.rows}:
            for key in ("reference", "relative_delta_norm", "data"):
                self.record[key].pop(name, None)

    def check(self, settings: Record) -> None:
        """Rows of one record are scored alike. Raises StaleRecordError."""
        if not self.rows and not self.record["reference"]:
            self.record["settings"] = settings
        if self.record["settings"] != settings:
            raise StaleRecordError(
                f"{self.path} was scored with {self.record['settings']}, not {settings}; give "
                "the same --rows, or --fresh for every fine-tune, method and ratio."
            )

    def check_finetune(self, name: str, relative_delta_norm: float) -> None:
        """A fine-tune that was trained again is another one, if on another kind of machine.

        Raises StaleRecordError.
        """
        if self.record["relative_delta_norm"].get(name, relative_delta_norm) != relative_delta_norm:
            raise StaleRecordError(
                f"{self.path} was measured on another training of {name}; give --fresh for every "
                "method and ratio, or another --record."
            )

    def lacks(self, cell: Cell, finetune: str) -> bool:
        """Whether a cell is still to be measured; not where seed 0 could not meet the size.

        Raises StaleRecordError if its row was made by another version of its codec, or calibrated
        otherwise.
        """
        rows = {row["seed"]: row for row in self._of(cell) if row["finetune"] == finetune}
        if cell.seed not in rows:
            return not (0 in rows and rows[0].get("unmet"))
        for key, value in named(cell, finetune).items():
            if rows[cell.seed][key] != value:
                raise StaleRecordError(
                    f"{self.path} has {cell.name} of {finetune} with {key} "
                    f"{rows[cell.seed][key]}, not {value}; give --fresh --methods {cell.method} "
                    "to measure it again."
                )
        return False

    def has_restored(self, cell: Cell) -> bool:
        """Whether an archive of this method and ratio has been restored and timed."""
        return any("restore_seconds" in row for row in self._of(cell))

    def _of(self, cell: Cell) -> list[Record]:
        asked = (cell.method, cell.file_ratio)
        return [row for row in self.rows if (row["method"], row["asked_file_ratio"]) == asked]

    def add(self, row: Record) -> None:
        """Take in a row and write the record."""
        self.record["rows"].append(row)
        self.record["seconds"] += row["cell_seconds"]
        peak_bytes = max(self.record["peak_memory_bytes"], row.get("peak_memory_bytes", 0))
        self.record["peak_memory_bytes"] = peak_bytes
        write_record(self.record, self.path)


def _key(row: Record) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("finetune", "method", "asked_file_ratio", "seed"))
