"""The demo: a fine-tune as a few small archives; what was saved and what it cost.

    make demo                   (or: python demo/run.py [--finetune sort] [--out out/demo])
    make demo OPTIONS=--all     every method at every size, not only the usual ones

Compresses a fine-tune of the small family in `demo/models` against its base, restores each archive
to an ordinary folder, measures base, fine-tune and restored models on the same rows under one
setting, prints a table of one screen and draws a figure. Half a minute on two cores; with `--all`
two minutes and several screens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import deltafold
from deltafold.codecs import get, names
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
MAIN_METHOD = "auto"  # what `compress` takes if no method is named
MAIN_RATIOS = (8, 32, 64, 128)  # the last is more than either fine-tune can bear
ALL_RATIOS = (8, 16, 32, 64)  # that every lossy method can meet on so small a model
Job = tuple[str, int | None]  # method, times smaller (None: the method has one size)


def say(text: str) -> None:
    """One line of what is going on."""
    print(text, file=sys.stderr, flush=True)


def jobs(everything: bool) -> list[Job]:
    """What is compressed: the usual way at a few sizes, or every method at every size too."""
    chosen: list[Job] = [("lossless", None), *((MAIN_METHOD, ratio) for ratio in MAIN_RATIOS)]
    if everything:
        for method in (name for name in names() if get(name).method):
            chosen += [(method, r) for r in (ALL_RATIOS if get(method).lossy else (None,))]
    return sorted(set(chosen), key=lambda job: (job[1] or 0, job[0]))


def name_of(job: Job) -> str:
    """`auto-32`, `lossless`."""
    method, ratio = job
    return f"{method}-{ratio}" if ratio else method


def clear(out: Path) -> None:
    """Take away what an earlier demo left in `out`; whatever else lies there stays."""
    for job in jobs(everything=True):
        for end in ("delta", "restored"):
            shutil.rmtree(out / f"{name_of(job)}.{end}", ignore_errors=True)
    (out / "record.json").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def make_archives(base: Path, finetuned: Path, out: Path, chosen: list[Job]) -> list[Record]:
    """Compress and restore; one row a job, its restored folder at `restored`."""
    rows = []
    for job in chosen:
        method, ratio = job
        archive, restored = out / f"{name_of(job)}.delta", out / f"{name_of(job)}.restored"
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
                "archive": archive.name,
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


def run(finetune: str, out: Path, everything: bool = False, limit: int | None = None) -> Path:
    """Do the demo on the first `limit` rows (None: all); returns the path of its record."""
    start = time.perf_counter()
    base, finetuned = HERE / "models" / "base", HERE / "models" / finetune
    task = HERE / "tasks" / f"{finetune}.jsonl"
    clear(out)
    chosen = jobs(everything)
    say(f"compressing {finetune} against its base, and restoring: {len(chosen)} archives ...")
    rows = make_archives(base, finetuned, out, chosen)
    say(f"measuring {len(rows)} restored models, base and fine-tune ...")
    measured = deltafold.evaluate(
        finetuned,
        [row["restored"] for row in rows],
        base=base,
        tasks=[task],
        batch_size=50,
        limit=limit,
    )
    by_path = {entry["path"]: scores(entry["metrics"], finetune) for entry in measured["models"]}
    for row in rows:
        row |= by_path[row.pop("restored")]
    training = json.loads((HERE / "models" / "training.json").read_text(encoding="utf-8"))
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "benchmark",
        "title": "demo family",
        "model": f"demo family ({measured_parameters(training)} parameters, bf16)",
        "data": f"task {finetune}, {measured['settings']['tasks'][0]['rows']} held-out rows",
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


def main(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    finetunes = sorted(path.stem for path in HERE.glob("tasks/*.jsonl"))
    finetunes = [name for name in finetunes if (HERE / "models" / name).is_dir()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finetune", default="sort", choices=finetunes)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--all", action="store_true", help="every method at every size")
    parser.add_argument("--rows", type=int, help="measure on the first ROWS rows (default: all)")
    options = parser.parse_args(arguments)
    if options.rows is not None and options.rows < 1:
        parser.error(f"--rows {options.rows}: at least 1 row is needed to measure on")
    torch.set_num_threads(1)  # matrices this small: a second thread mostly waits, and waits busily
    record = run(options.finetune, options.out, options.all, options.rows)

    from screen import show

    show(record, options.finetune, options.all)


if __name__ == "__main__":
    main()
