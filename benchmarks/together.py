"""Memory of k fine-tunes over one copy of their base, in one process, as k grows.

    python benchmarks/together.py BASE ARCHIVE [ARCHIVE ...] [--counts 1 4 16] [--rank 64]
    python benchmarks/together.py --into docs/commands/export.md      # the table, from the record

Each count is a process of its own: the base is loaded with k adapters, every fine-tune answers once,
one batch holds a row of each. Where k is more than the archives given, archives are taken again
under other names: they take as much memory as different ones. Adapters are made beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from deltafold.checkpoint import open_checkpoint
from deltafold.reporting.markdown import rewrite_block
from deltafold.running.memory import Meter, resident_bytes
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

OUT = Path(__file__).parent / "records" / "together.json"


def measure(base: str, archives: list[str], count: int, rank: int | None) -> Record:
    """Load `count` fine-tunes into this process; resident memory after each step."""
    import torch

    from deltafold.exporting.together import load_together

    torch.set_num_threads(1)
    deltas = {f"tune{n}": archives[n % len(archives)] for n in range(count)}
    before = resident_bytes()
    with Meter() as meter:
        model = load_together(base, deltas, rank=rank)
        loaded = resident_bytes()
        rows = torch.arange(1, 33)[None]
        with torch.no_grad():
            for name in deltas:
                with model.using(name):
                    model(rows)
            model(rows.repeat(count, 1), adapter_names=list(deltas))
    adapters = sum(
        p.numel() * p.element_size() for n, p in model.named_parameters()
        if "lora_" in n or "modules_to_save" in n
    )  # fmt: skip
    return {
        "fine_tunes": count,
        "resident_bytes": loaded,
        "libraries_bytes": before,
        "adapter_parameter_bytes": adapters,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "seconds": meter.seconds,
    }


def prepare(base: str, archives: list[str], rank: int | None) -> float:
    """Make the adapters; the bytes of one, on average."""
    from deltafold.exporting.kept import find_adapter

    made = [find_adapter("tune", archive, base, rank=rank) for archive in archives]
    sizes = [sum(f.stat().st_size for f in each.folder.iterdir()) for each in made]
    return sum(sizes) / len(sizes)


def table(record: Record) -> str:
    """The record as a Markdown table."""
    lines = [
        "| fine-tunes | resident memory | of it adapters | peak while answering | k whole checkpoints |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        cells = [
            row["resident_bytes"], row["adapter_parameter_bytes"], row["peak_memory_bytes"],
            row["fine_tunes"] * record["checkpoint_bytes"],
        ]  # fmt: skip
        shown = " | ".join(f"{cell / 1e6:,.0f} MB" for cell in cells)
        lines.append(f"| {row['fine_tunes']} | {shown} |")
    found, used = record["machine"], record["settings"]
    names = ", ".join(dict.fromkeys(used["archives"]))
    note = (
        f"Base: {record['checkpoint_bytes'] / 1e6:,.0f} MB of weights. Adapters of {names}, "
        f"{record['adapter_bytes'] / 1e6:,.1f} MB each on disk. Resident memory: Python and its "
        f"libraries ({record['rows'][0]['libraries_bytes'] / 1e6:,.0f} MB before anything is "
        f"loaded) included. Machine: {found['cpu']}, {found['cores']} cores, torch "
        f"{found['torch']}. Whole checkpoints: bytes of weights alone, not measured."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    """Parse, run each count in a process of its own, write the record; or the table from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?")
    parser.add_argument("archives", nargs="*")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--rank", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    asked = parser.parse_args()
    if asked.into:
        rewrite_block(asked.into, "together", table(json.loads(asked.out.read_text())))
        return
    if asked.one is not None:
        print(json.dumps(measure(asked.base, asked.archives, asked.one, asked.rank)))
        return
    with open_checkpoint(asked.base) as base:
        weight_bytes = base.weight_bytes
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "together",
        "checkpoint_bytes": weight_bytes,
        "adapter_bytes": prepare(asked.base, asked.archives, asked.rank),
        "settings": {
            "base": Path(asked.base).name,
            "archives": [Path(archive).name for archive in asked.archives],
            "rank": asked.rank,
        },
        "rows": [],
        "machine": machine(),
    }
    for count in asked.counts:
        command = [sys.executable, __file__, asked.base, *asked.archives, "--one", str(count)]
        command += ["--rank", str(asked.rank)] if asked.rank else []
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        record["rows"].append(json.loads(done.stdout.splitlines()[-1]))
        write_record(record, asked.out)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
