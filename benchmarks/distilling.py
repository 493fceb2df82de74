"""What `--steps` gains: each method that can be trained, with and without, on the demo family.

    python benchmarks/distilling.py                       # measures, some minutes; writes the record
    python benchmarks/distilling.py --into docs/auto.md   # writes the table from the record

Both archives have the same size. KL of the restored model to the fine-tune, on held-out answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from families import Family, FineTune, demo
from smollm2 import default_cache

import deltafold
from deltafold.reporting.markdown import rewrite_block
from deltafold.running.memory import Meter
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

RECORD = Path(__file__).parent / "records" / "distill-demo.json"
CELLS = (("bitdelta", 32), ("lowrank", 32), ("delta-come", 64), ("auto", 64), ("auto", 96))


def measure(family: Family, finetune: FineTune, steps: int, rows: int) -> list[Record]:
    """One row a cell: bytes, and KL before and after."""
    found: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        for method, ratio in CELLS:
            archives = [Path(scratch) / f"{method}-{ratio}-{n}.delta" for n in (0, steps)]
            made = [
                deltafold.compress(
                    family.base, finetune.folder, archive, method, file_ratio=ratio,
                    calibration=finetune.calibration, max_tokens=32, distill=n,
                )
                for archive, n in zip(archives, (0, steps), strict=True)
            ]  # fmt: skip
            scored = deltafold.evaluate(
                finetune.folder, archives, base=family.base, tasks=[finetune.task],
                batch_size=50, limit=rows,
            )  # fmt: skip
            kl = {
                entry["path"]: entry["metrics"]["tasks"][finetune.task.stem]["kl"]["value"]
                for entry in scored["models"]
                if entry["role"] == "candidate"
            }
            found.append(
                {
                    "finetune": finetune.name,
                    "method": method,
                    "asked_file_ratio": ratio,
                    "archive_bytes": [record["totals"]["archive_bytes"] for record in made],
                    "kl": [kl[str(archive)] for archive in archives],
                    "values_trained": made[1]["distill"]["values"],
                    "kept": made[1]["distill"]["kept"],
                    "seconds": made[1]["distill"]["seconds"],
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def run(steps: int, rows: int, cache: Path) -> None:
    """Measure the demo's fine-tune and write the record."""
    family = demo(cache)
    with Meter() as meter:
        measured = measure(family, family.finetunes["sort"], steps, rows)
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "distilling",
        "model": family.model,
        "data": f"task sort, {rows} held-out rows; trained for {steps} steps on prompts of training "
        "rows without answers",
        "rows": measured,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "machine": machine(),
    }
    write_record(record, RECORD)


def table(record: Record) -> str:
    """KL with and without training."""
    lines = [
        "| method | smaller | numbers trained | KL | KL after training | training |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        before, after = row["kl"]
        lines.append(
            f"| {row['method']} | {row['asked_file_ratio']}x | {row['values_trained']:,} | "
            f"{before:.2g} | {after:.2g} | {row['seconds']:.0f} s |"
        )
    device = record["machine"]
    lines += [
        "",
        f"Model: {record['model']}. Data: {record['data']}. One seed. "
        f"Machine: {device['cpu']}, {device['cores']} cores, deltafold {device['deltafold']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--into", type=Path, help="Markdown file: write the table there")
    arguments = parser.parse_args()
    if arguments.into:
        rewrite_block(arguments.into, "distilling", table(json.loads(RECORD.read_text())))
    else:
        run(arguments.steps, arguments.rows, arguments.cache)


if __name__ == "__main__":
    main()
