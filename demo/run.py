"""The demo: one fine-tune, several methods and sizes; what was saved and what it cost.

    make demo            (or: python demo/run.py [--finetune sort] [--out out/demo])

Compresses a fine-tune of the small family in `demo/models` against its base, restores each archive
to an ordinary folder, measures base, fine-tune and restored models under one setting, prints the
table and draws the figures. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import deltafold
from deltafold.codecs import get, names
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
RATIOS = (8, 16, 32, 64)


def say(text: str) -> None:
    """One line of what is going on."""
    print(text, file=sys.stderr, flush=True)


def make_archives(base: Path, finetuned: Path, out: Path) -> list[Record]:
    """Compress and restore every method at every ratio; one row each."""
    rows = []
    for method in (name for name in names() if get(name).method):
        for ratio in RATIOS if get(method).lossy else (None,):
            name = f"{method}-{ratio}" if ratio else method
            archive, restored = out / f"{name}.delta", out / f"{name}.restored"
            budget = {"file_ratio": ratio} if ratio else {}
            record = deltafold.compress(base, finetuned, archive, method, **budget)
            deltafold.restore(archive, base, restored)
            rows.append(
                {
                    "finetune": finetuned.name,
                    "method": method,
                    "asked_file_ratio": ratio,
                    "file_ratio": record["totals"]["file_ratio"],
                    "nominal_ratio": record["totals"]["nominal_ratio"],
                    "archive_bytes": record["totals"]["archive_bytes"],
                    "restored": str(restored),
                }
            )
    return rows


def scores(metrics: dict[str, Any], task: str) -> dict[str, float]:
    """The columns of the table from one model's measurements: accuracy on the task, KL on it."""
    found = metrics["tasks"][task]
    keys = [key for key in ("exact_match", "kl", "agreement") if key in found]
    values = {key: found[key]["value"] for key in keys}
    return values | {f"{key}_stderr": found[key]["stderr"] for key in keys}


def run(finetune: str, out: Path) -> Path:
    """Do the demo; returns the path of its record."""
    start = time.perf_counter()
    base, finetuned = HERE / "models" / "base", HERE / "models" / finetune
    task = HERE / "tasks" / f"{finetune}.jsonl"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    say(f"compressing {finetuned} against {base}, and restoring ...")
    rows = make_archives(base, finetuned, out)
    say(f"measuring {len(rows)} restored models, base and fine-tune ...")
    measured = deltafold.evaluate(
        finetuned, [row["restored"] for row in rows], base=base, tasks=[task], batch_size=50
    )
    by_path = {entry["path"]: scores(entry["metrics"], finetune) for entry in measured["models"]}
    for row in rows:
        row |= by_path[row.pop("restored")]
    training = json.loads((HERE / "models" / "training.json").read_text())
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "benchmark",
        "title": "demo family",
        "model": f"demo family ({measured_parameters(training)} parameters, bf16)",
        "data": f"task {finetune}, {len(task.read_text().splitlines())} held-out rows",
        "rows": rows,
        "reference": {finetune: {"base": by_path[str(base)], "fine-tune": by_path[str(finetuned)]}},
        "settings": measured["settings"],
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "machine": machine(),
    }
    write_record(record, out / "record.json")
    return out / "record.json"


def measured_parameters(training: dict[str, Any]) -> str:
    """`3.2 M`, from the training record."""
    return f"{training['base']['parameters'] / 1e6:.1f} M"


def show(record_path: Path, finetune: str) -> None:
    """Print the table, draw the figures, say where things are and what to try next."""
    from rich.console import Console

    from deltafold.reporting.figures import figures_of
    from deltafold.reporting.tables import tables_of
    from deltafold.running.record import read_record

    out = record_path.parent
    record = read_record(record_path)
    console = Console()
    for table in tables_of(record):
        for part in table.rich(console.width):
            console.print(part)
    impart = read_record(out / "impart-32.delta")
    for figure in figures_of([record, impart], out / "figures"):
        console.print(f"figure: {figure}")
    console.print(f"record: {record_path}   ({record['seconds']:.0f} s)")
    console.print(
        "\nTry it yourself:\n"
        f"  deltafold compress demo/models/base demo/models/{finetune} -o my.delta --file-ratio 32\n"
        "  deltafold inspect my.delta\n"
        "  deltafold restore my.delta --base demo/models/base -o restored/",
        soft_wrap=True,
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finetune", default="sort", help="a folder of demo/models")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    arguments = parser.parse_args()
    show(run(arguments.finetune, arguments.out), arguments.finetune)


if __name__ == "__main__":
    main()
