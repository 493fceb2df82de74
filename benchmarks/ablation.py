"""What each part of `auto` is worth: the codec with one part changed, on the demo family.

    python benchmarks/ablation.py                       # measures, a few minutes; writes the record
    python benchmarks/ablation.py --into docs/auto.md   # writes the table from the record

Each variant compresses at several file ratios; archives, so true bytes, are compared by the KL of the
restored model to the fine-tune on held-out answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from families import Family, FineTune, demo
from numpy.typing import NDArray
from smollm2 import default_cache

import deltafold
from deltafold.codecs import auto, steps
from deltafold.coding import dither
from deltafold.reporting.markdown import rewrite_block
from deltafold.running.memory import Meter
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

RECORD = Path(__file__).parent / "records" / "ablation-demo.json"
RATIOS = (16, 32, 64, 96)


def _halfway(key: int, start: int, stop: int) -> NDArray[np.uint16]:
    """The same threshold everywhere: rounding to nearest."""
    return np.full(stop - start, dither.THRESHOLDS // 2, dtype=np.uint16)


NO, TASK = "none", "task"  # calibration; None is what compress takes by itself
FLAT = 1e9  # a floor above which all rows, or columns, count alike
VARIANTS: dict[str, tuple[str | None, dict[tuple[Any, str], Any]]] = {
    "as it is": (None, {}),
    "finer rows and columns, not matrices": (None, {(steps, "TRUST"): 0.0}),
    "matrices by cost alone, not by their size": (None, {(steps, "TRUST"): 1.0}),
    "no finer columns": (None, {(steps, "COLUMN_FLOOR"): FLAT}),
    "no finer rows": (None, {(steps, "ROW_FLOOR"): FLAT}),
    "the same relative step everywhere": (NO, {}),
    "the same, and in all rows of the vocabulary": (NO, {(steps, "UNEVEN"): float("inf")}),
    "the same, rounded to nearest, no seeded thresholds": (
        NO,
        {(dither, "thresholds"): _halfway},
    ),
    "as it is, with calibration text of the task": (TASK, {}),
    "so, but errors not fed forward": (TASK, {(auto, "UNSETTLED"): -1.0}),
}


@contextmanager
def changed(patches: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """The codec with some of its names bound to other values."""
    with ExitStack() as stack:
        for (module, name), value in patches.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def measure(family: Family, finetune: FineTune, rows: int) -> list[Record]:
    """One row a variant and ratio: true bytes, and KL of the model made from the archive."""
    found: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (calibration, patches) in VARIANTS.items():
            with changed(patches):  # decoding derives the thresholds too
                made = [
                    compress(family, finetune, name, calibration, ratio, Path(scratch))
                    for ratio in RATIOS
                ]
                scored = deltafold.evaluate(
                    finetune.folder,
                    [row["archive"] for row in made],
                    base=family.base,
                    tasks=[finetune.task],
                    batch_size=50,
                    limit=rows,
                )
            kl = {
                entry["path"]: entry["metrics"]["tasks"][finetune.task.stem]["kl"]
                for entry in scored["models"]
                if entry["role"] == "candidate"
            }
            found += [row | {"kl": kl[row.pop("archive")]["value"]} for row in made]
            print(json.dumps(found[-len(made) :]), flush=True)
    return found


def compress(
    family: Family,
    finetune: FineTune,
    variant: str,
    calibration: str | None,
    ratio: int,
    scratch: Path,
) -> Record:
    """One archive; its row still names the archive."""
    archive = scratch / f"{len(list(scratch.iterdir()))}.delta"
    text = finetune.calibration if calibration == TASK else calibration
    record = deltafold.compress(
        family.base, finetune.folder, archive, "auto", file_ratio=ratio, calibration=text
    )
    return {
        "finetune": finetune.name,
        "variant": variant,
        "asked_file_ratio": ratio,
        "archive_bytes": record["totals"]["archive_bytes"],
        "archive": str(archive),
    }


def run(rows: int, cache: Path) -> None:
    """Measure every fine-tune of the demo family and write the record."""
    family = demo(cache)
    with Meter() as meter:
        measured = [
            row for each in family.finetunes.values() for row in measure(family, each, rows)
        ]
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "ablation",
        "model": family.model,
        "data": f"tasks of the demo, {rows} held-out rows each; calibration on prompts of training "
        "rows without answers",
        "rows": measured,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "machine": machine(),
    }
    write_record(record, RECORD)


def table(record: Record) -> str:
    """KL by variant and file ratio, a table a fine-tune."""
    lines = []
    for name in dict.fromkeys(row["finetune"] for row in record["rows"]):
        lines += [f"**{name}**: KL from the fine-tune at file ratio", ""]
        lines += [f"| `auto` | {' | '.join(f'{ratio}x' for ratio in RATIOS)} |"]
        lines += ["|---|" + "--:|" * len(RATIOS)]
        for variant in VARIANTS:
            cells = [
                f"{row['kl']:.2g}"
                for row in record["rows"]
                if (row["finetune"], row["variant"]) == (name, variant)
            ]
            if cells:
                lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    device = record["machine"]
    lines.append(
        f"Model: {record['model']}. Data: {record['data']}. One seed. "
        f"Machine: {device['cpu']}, {device['cores']} cores, deltafold {device['deltafold']}."
    )
    return "\n".join(lines)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--into", type=Path, help="Markdown file: write the table there")
    arguments = parser.parse_args()
    if arguments.into:
        rewrite_block(arguments.into, "ablation", table(json.loads(RECORD.read_text())))
    else:
        run(arguments.rows, arguments.cache)


if __name__ == "__main__":
    main()
