"""Heavy commands on the CPU and on a GPU, side by side: seconds, memory, and what the result lost.

    python benchmarks/devices.py [demo | smollm2] [--devices cpu cuda] [--steps svd-quant restore]
    python benchmarks/devices.py --into docs/gpu.md      # the table, from the record

Each command runs in a process of its own, with nothing measured before that it could find again. A
device that is not there is left out, so that the same line runs anywhere. Rows replace those of the
same model, step and device in `benchmarks/records/devices.json`.

Loss, of `compress` and `export`: |D - D'| / |D| over all deltas, as the run's record has it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm2 import default_cache

from deltafold.reporting.markdown import rewrite_block
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
MODELS = default_cache()
DEMO = HERE.parent / "demo" / "models"
PAIRS = {
    "demo": (DEMO / "base", DEMO / "add"),
    "smollm2": (MODELS / "smollm2-base", MODELS / "smollm2-arithmetic"),
}
STEPS = ("svd-quant", "impart", "auto", "restore", "export", "factor", "fold")


def command(step: str, base: Path, tuned: Path, folder: Path) -> list[str]:
    """The command of a step; archives that it reads lie in `folder`."""
    archive, out = folder / "made.delta", folder / step
    if step in ("svd-quant", "impart", "auto"):
        return ["compress", str(base), str(tuned), "-o", str(out), "-m", step]
    if step == "restore":
        return ["restore", str(archive), "--base", str(base), "-o", str(out)]
    if step == "export":
        return ["export", str(archive), "--base", str(base), "-o", str(out), "--rank", "32"]
    if step == "factor":
        return ["factor", str(base), "-o", str(out), "-m", "lord", "--parameters", "0.9",
                "--samples", "32"]  # fmt: skip
    return ["fold", str(base), "-o", str(out), "-m", "shortgpt", "--blocks", "1"]


def lost(record: Record) -> float | None:
    """Relative error of the deltas, where the run states it."""
    if record["kind"] == "export":
        return float(record["relative_error"])
    rows = [row for row in record.get("tensors", []) if row.get("relative_error") is not None]
    total = sum(row["delta_norm"] ** 2 for row in rows if "delta_norm" in row)
    wrong = sum((row["relative_error"] * row.get("delta_norm", 0.0)) ** 2 for row in rows)
    return math.sqrt(wrong / total) if total else None


def run(arguments: list[str], out: Path, device: str, cache: Path) -> dict[str, Any]:
    """Run one command on a device: seconds, the system's account of memory, what its record says."""
    environment = os.environ | {"DELTAFOLD_CACHE": str(cache)}
    line = [sys.executable, "-m", "deltafold", *arguments, "--device", device]
    start = time.perf_counter()
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"deltafold {' '.join(arguments)} failed on {device}")
    seconds = time.perf_counter() - start
    record = json.loads(Path(f"{out}.record.json").read_text())
    return {
        "device": record["machine"]["device"],
        "seconds": seconds,
        "command_seconds": record["seconds"],
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "lost": lost(record),
        "chosen": record.get("device"),
    }


def measure(
    model: str, steps: list[str], devices: list[str], scratch: Path | None
) -> Iterator[Record]:
    """A row for each step on each device."""
    base, tuned = PAIRS[model]
    for device in devices:
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            folder = Path(name)
            if {"restore", "export"} & set(steps):
                made = ["compress", str(base), str(tuned), "-o", str(folder / "made.delta"),
                        "-m", "svd-quant"]  # fmt: skip
                run(made, folder / "made.delta", "cpu", folder / "cache")
            for step in steps:
                arguments = command(step, base, tuned, folder)
                found = run(arguments, folder / step, device, folder / f"cache-{step}")
                yield {"model": model, "step": step, "asked": device} | found


def available(asked: list[str]) -> list[str]:
    """The devices that are here."""
    import torch

    return [each for each in asked if each == "cpu" or torch.cuda.is_available()]


def add(row: Record, path: Path) -> None:
    """Put a row into the record, in place of the one of the same model, step and device."""
    record = json.loads(path.read_text()) if path.is_file() else {}
    row["machine"] = machine()
    rows = {(r["model"], r["step"], r["device"]): r for r in record.get("rows", [])}
    rows[row["model"], row["step"], row["device"]] = row
    fixed: Record = {"record_version": RECORD_VERSION, "kind": "devices"}
    write_record(fixed | {"machine": row["machine"], "rows": list(rows.values())}, path)
    print(json.dumps(row), flush=True)


def table(record: Record) -> str:
    """The record as a Markdown table: a row a step, a column a device."""
    devices = list(dict.fromkeys(row["device"] for row in record["rows"]))
    lines = [
        f"| model | step | {' | '.join(devices)} | lost |",
        f"|:--|:--|{'--:|' * len(devices)}--:|",
    ]
    steps = dict.fromkeys((row["model"], row["step"]) for row in record["rows"])
    for model, step in steps:
        rows = {r["device"]: r for r in record["rows"] if (r["model"], r["step"]) == (model, step)}
        times = [f"{rows[d]['seconds']:.1f} s" if d in rows else "" for d in devices]
        losses = [f"{rows[d]['lost']:.4f}" for d in devices if d in rows and rows[d]["lost"]]
        lines.append(f"| {model} | {step} | {' | '.join(times)} | {', '.join(losses)} |")
    where = dict.fromkeys(
        f"{row['machine']['cores']} cores, {row['machine']['cpu']}" for row in record["rows"]
    )
    return "\n".join([*lines, "", f"Start of Python included; {'; '.join(where)}."])


def main() -> None:
    """Parse, run, write the record; or write the table from the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=list(PAIRS), default="demo")
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    parser.add_argument("--scratch", type=Path, help="folder with room for a few checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "devices.json")
    arguments = parser.parse_args()
    if arguments.into:
        rewrite_block(arguments.into, "devices", table(json.loads(arguments.out.read_text())))
        return
    here = available(arguments.devices)
    for row in measure(arguments.model, arguments.steps, here, arguments.scratch):
        add(row, arguments.out)


if __name__ == "__main__":
    main()
