"""Every codec at several file ratios on a real model: bytes, accuracy, KL, seconds, memory.

    python benchmarks/smollm2.py prepare            # base and fine-tune, once, into a cache
    python benchmarks/codecs.py                     # all cells; goes on where it stopped

Each cell runs the command line as a user would: `compress`, then `restore`, each in a process of its
own, timed from outside; then the restored folder is measured as an ordinary model. Cells are kept as
they are finished in `benchmarks/records/`; tables and figures are drawn from that record.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from smollm2 import default_cache

from deltafold.codecs import get, names
from deltafold.evaluation import evaluate
from deltafold.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
RATIOS = (8, 16, 32, 64, 128)
Cell = tuple[str, int | None]


def cells(methods: list[str], ratios: list[int]) -> list[Cell]:
    """(method, file ratio) of every cell; exact methods have one, without a ratio."""
    return [(m, ratio) for m in methods for ratio in (ratios if get(m).lossy else [None])]


def run(arguments: list[str]) -> float:
    """Seconds of one deltafold command, start of the process included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "deltafold", *arguments], check=True)
    return time.perf_counter() - start


def make(cell: Cell, base: Path, finetuned: Path, folder: Path) -> Record:
    """Compress and restore one cell under `folder`; returns sizes, seconds and memory."""
    method, ratio = cell
    archive, restored = folder / "cell.delta", folder / "restored"
    budget = [] if ratio is None else ["--file-ratio", str(ratio)]
    common = ["--overwrite", "--restart"]
    compress_seconds = run(
        ["compress", str(base), str(finetuned), "-o", str(archive), "-m", method, *budget, *common]
    )
    restore_seconds = run(
        ["restore", str(archive), "--base", str(base), "-o", str(restored), *common]
    )
    record = json.loads(Path(f"{archive}.record.json").read_text())
    restore_record = json.loads(Path(f"{restored}.record.json").read_text())
    return {
        "finetune": finetuned.name,
        "method": method,
        "asked_file_ratio": ratio,
        "file_ratio": record["totals"]["file_ratio"],
        "nominal_ratio": record["totals"]["nominal_ratio"],
        "archive_bytes": record["totals"]["archive_bytes"],
        "compress_seconds": compress_seconds,
        "restore_seconds": restore_seconds,
        "peak_memory_bytes": record["peak_memory_bytes"],
        "restore_peak_memory_bytes": restore_record["peak_memory_bytes"],
        "settings": record["settings"],
    }


def scores(entry: dict[str, Any], task: str) -> dict[str, Any]:
    """Accuracy, KL and agreement of one measured model, as a row's columns."""
    found = entry["metrics"]["tasks"][task]
    row: dict[str, Any] = {}
    for key in ("exact_match", "kl", "agreement"):
        if key in found:
            row[key], row[f"{key}_stderr"] = found[key]["value"], found[key]["stderr"]
    return row


def measure(
    path: Path, finetuned: Path, base: Path | None, task: Path
) -> dict[str, dict[str, Any]]:
    """Scores by role of one evaluation in fp32 (the CPU's bf16 is slower)."""
    record = evaluate(finetuned, [path], base=base, tasks=[task], dtype="fp32", batch_size=25)
    return {entry["role"]: scores(entry, task.stem) for entry in record["models"]}


def benchmark(arguments: argparse.Namespace) -> Path:
    """Run all cells that are not in the record yet."""
    cache: Path = arguments.cache
    base, finetuned = cache / "smollm2-base", cache / f"smollm2-{arguments.finetune}"
    training = json.loads((finetuned / "training.json").read_text())
    task = cache / "tasks" / f"{training['settings']['task']}.test.jsonl"
    out = HERE / "records" / f"smollm2-{arguments.finetune}.json"
    out.parent.mkdir(exist_ok=True)
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "benchmark",
        "title": f"SmolLM2-135M-Instruct, fine-tune `{arguments.finetune}`",
        "model": "SmolLM2-135M-Instruct (134.5 M parameters, bf16, tied embeddings)",
        "data": f"{training['settings']['task']}: {training['test_rows']} held-out rows; "
        f"{training['settings']['steps']} steps at {training['settings']['lr']:g}, all parameters",
        "training": training,
        "rows": [],
        "reference": {},
        "settings": {"seed": 0, "dtype": "fp32"},
        "seconds": 0.0,
        "peak_memory_bytes": 0,
        "machine": machine(),
    }
    if out.is_file() and not arguments.fresh:
        record = json.loads(out.read_text())
    done = {(row["method"], row["asked_file_ratio"]) for row in record["rows"]}
    for cell in cells(arguments.methods, arguments.ratios):
        if cell in done:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
            row = make(cell, base, finetuned, Path(name))
            first = finetuned.name not in record["reference"]
            found = measure(Path(name) / "restored", finetuned, base if first else None, task)
        if first:
            record["reference"][finetuned.name] = {r: found[r] for r in ("base", "fine-tune")}
        record["rows"].append(row | found["candidate"])
        record["seconds"] += time.perf_counter() - start
        record["peak_memory_bytes"] = max(record["peak_memory_bytes"], row["peak_memory_bytes"])
        write_record(record, out)
        print(json.dumps(record["rows"][-1]), flush=True)
    return out


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    methods = [name for name in names() if get(name).method]
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--finetune", default="arithmetic")
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--ratios", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--scratch", type=Path, help="folder for archives and restored models")
    parser.add_argument("--fresh", action="store_true", help="measure every cell again")
    arguments = parser.parse_args()
    if arguments.scratch:
        shutil.rmtree(arguments.scratch, ignore_errors=True)
        arguments.scratch.mkdir(parents=True)
    print(benchmark(arguments))


if __name__ == "__main__":
    main()
