"""Every codec at several file ratios on a real model: bytes, accuracy, KL, seconds, memory.

    python benchmarks/smollm2.py prepare            # base and fine-tune, once, into a cache
    python benchmarks/codecs.py                     # all cells; goes on where it stopped

Each cell runs the command line as a user would: `compress`, then `restore`, each in a process of its
own, timed from outside; then the restored folder is measured as an ordinary model. Rows are kept as
methods are finished in `benchmarks/records/`; tables and figures are drawn from that record.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import Cell, compress, methods, restore
from smollm2 import default_cache

from deltafold.codecs import get
from deltafold.evaluation.evaluate import evaluate
from deltafold.reporting.markdown import rewrite_block
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
RATIOS = (8, 16, 32, 64, 128)


def make(cell: Cell, base: Path, finetuned: Path, folder: Path) -> Record:
    """Compress and restore one cell under `folder`; returns sizes, seconds and memory."""
    archive, restored = folder / f"{cell.name}.delta", folder / cell.name
    return {
        "finetune": finetuned.name,
        "method": cell.method,
        "asked_file_ratio": cell.file_ratio,
        **compress(cell, base, finetuned, archive),
        **restore(archive, base, restored),
        "restored": str(restored),
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
    rows: list[Record], finetuned: Path, base: Path | None, task: Path, limit: int
) -> dict[str, dict[str, Any]]:
    """Scores by path of the restored models, the fine-tune and the base, in one evaluation.

    In fp32: this CPU's bf16 is slower. Adds each row's scores to it.
    """
    models = [row.pop("restored") for row in rows]
    record = evaluate(
        finetuned, models, base=base, tasks=[task], dtype="fp32", batch_size=25, limit=limit
    )
    found = {entry["path"]: scores(entry, task.stem) for entry in record["models"]}
    for row, model in zip(rows, models, strict=True):
        row |= found[model]
    return found


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
        "title": "SmolLM2-135M-Instruct",
        "model": "SmolLM2-135M-Instruct (134.5 M parameters, bf16, tied embeddings)",
        "data": f"{training['settings']['task']}, {arguments.limit} held-out rows; fine-tuned for "
        f"{training['settings']['steps']} steps at learning rate {training['settings']['lr']:g}, "
        "all parameters trained",
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
    for method in arguments.methods:
        ratios = arguments.ratios if get(method).lossy else [None]
        wanted = [Cell(method, ratio) for ratio in ratios if (method, ratio) not in done]
        if not wanted:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
            rows = [make(cell, base, finetuned, Path(name)) for cell in wanted]
            first = finetuned.name not in record["reference"]
            found = measure(rows, finetuned, base if first else None, task, arguments.limit)
        if first:
            names_of = {"base": str(base), "fine-tune": str(finetuned)}
            record["reference"][finetuned.name] = {r: found[p] for r, p in names_of.items()}
        record["rows"] += rows
        record["seconds"] += time.perf_counter() - start
        record["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in record["rows"])
        write_record(record, out)
        for row in rows:
            print(json.dumps(row), flush=True)
    return out


def summary(record: Record) -> str:
    """The best method of each size as a short Markdown table: what one gets."""
    (reference,) = record["reference"].values()
    lines = [
        "| archive | smaller | best method | exact match | KL from the fine-tune |",
        "|--:|--:|---|--:|--:|",
        f"| fine-tune itself | | | {reference['fine-tune']['exact_match']:.0%} | |",
    ]
    sizes = dict.fromkeys(row["asked_file_ratio"] for row in record["rows"])
    for asked in sorted(sizes, key=lambda ratio: ratio or 0):
        rivals = [row for row in record["rows"] if row["asked_file_ratio"] == asked]
        best = min(rivals, key=lambda row: (row["kl"], row["archive_bytes"]))
        digits = f"{float(format(best['kl'], '.2g')):.9f}".rstrip("0")
        kl = digits if best["kl"] else "0, every bit back"
        lines.append(
            f"| {best['archive_bytes'] / 1e6:.1f} MB | {best['file_ratio']:.1f}x "
            f"| `{best['method']}` | {best['exact_match']:.0%} | {kl} |"
        )
    base = reference["base"]
    note = (
        f"{record['model']}. {record['data'].capitalize()}. "
        f"Base alone: exact match {base['exact_match']:.0%}, KL {base['kl']:.2f}."
    )
    return "\n".join([*lines, "", note])


def time_again(arguments: argparse.Namespace) -> Path:
    """Compress and restore every cell of the record once more, on a machine that does nothing else.

    Scores do not depend on what else runs; seconds do.
    """
    base = arguments.cache / "smollm2-base"
    out = HERE / "records" / f"smollm2-{arguments.finetune}.json"
    record = json.loads(out.read_text())
    for row in record["rows"]:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
            cell = Cell(row["method"], row["asked_file_ratio"])
            again = make(cell, base, arguments.cache / row["finetune"], Path(name))
        if again["archive_bytes"] != row["archive_bytes"]:
            raise SystemExit(f"{cell.name} has another size now: measure it again with --fresh")
        row |= {key: again[key] for key in row if key.endswith(("_seconds", "_memory_bytes"))}
    record["machine"] = machine()
    write_record(record, out)
    return out


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--finetune", default="arithmetic")
    parser.add_argument("--methods", nargs="+", default=methods())
    parser.add_argument("--ratios", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--scratch", type=Path, help="folder for archives and restored models")
    parser.add_argument("--limit", type=int, default=200, help="rows of the task to score")
    parser.add_argument("--summary", type=Path, help="Markdown file: write the short table there")
    parser.add_argument("--time-again", action="store_true", help="measure only seconds and memory")
    parser.add_argument("--fresh", action="store_true", help="measure every cell again")
    arguments = parser.parse_args()
    if arguments.scratch:
        shutil.rmtree(arguments.scratch, ignore_errors=True)
        arguments.scratch.mkdir(parents=True)
    if arguments.summary:
        record = HERE / "records" / f"smollm2-{arguments.finetune}.json"
        rewrite_block(arguments.summary, "summary", summary(json.loads(record.read_text())))
    else:
        print(time_again(arguments) if arguments.time_again else benchmark(arguments))


if __name__ == "__main__":
    main()
