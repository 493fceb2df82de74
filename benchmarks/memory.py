"""Peak memory of compress, restore and merge on synthetic sharded checkpoints, whatever their size.

    python benchmarks/memory.py [--gigabytes 4] [--methods lossless dare magnitude impart]
    python benchmarks/memory.py --methods --merges ties task-arithmetic       # merging alone
    python benchmarks/memory.py --into docs/commands/compress.md  # the table, from the record

Writes a base and fine-tunes (Llama-like names and shapes, bf16, shards of 1 GB) a tensor at a time,
runs each command in a process of its own, and reads the process's peak resident memory from the
operating system. Rows replace those of the same method in `benchmarks/records/memory.json`.

Merging takes three fine-tunes. The third is the first once more, by links: files are read, not
mapped, so that it costs the merge as much as any, and the disk nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from deltafold.checkpoint import CheckpointWriter, plan_shards
from deltafold.checkpoint.writer import TensorSpec
from deltafold.reporting.markdown import rewrite_block
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

WIDTH, MIDDLE, VOCABULARY = 2048, 8192, 32000
HERE = Path(__file__).parent


def specs(gigabytes: float) -> list[TensorSpec]:
    """Names and shapes of about `gigabytes` of bf16 weights."""
    found: list[TensorSpec] = [("model.embed_tokens.weight", "BF16", (VOCABULARY, WIDTH))]
    block_bytes = 2 * (2 * WIDTH * WIDTH + 2 * 512 * WIDTH + 3 * WIDTH * MIDDLE)
    blocks = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / block_bytes))
    for block in range(blocks):
        at = f"model.layers.{block}."
        for name, rows in (("q", WIDTH), ("k", 512), ("v", 512), ("o", WIDTH)):
            found.append((f"{at}self_attn.{name}_proj.weight", "BF16", (rows, WIDTH)))
        found.append((f"{at}mlp.gate_proj.weight", "BF16", (MIDDLE, WIDTH)))
        found.append((f"{at}mlp.up_proj.weight", "BF16", (MIDDLE, WIDTH)))
        found.append((f"{at}mlp.down_proj.weight", "BF16", (WIDTH, MIDDLE)))
        found.append((f"{at}input_layernorm.weight", "BF16", (WIDTH,)))
    return [*found, ("lm_head.weight", "BF16", (VOCABULARY, WIDTH))]


def values(number: int, shape: tuple[int, ...], tuned: int) -> torch.Tensor:
    """Weights of one tensor; a fine-tune's (1, 2, ...) move by a matrix of falling spectrum.

    The base's are one block of noise, turned and repeated: quick, and no two rows alike.
    """
    generator = torch.Generator().manual_seed(number + 1_000_000 * (tuned - 1))
    n = math.prod(shape)
    block = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    weight = block.roll(7919 * number).repeat(-(-n // len(block)))[:n].reshape(shape)
    if tuned and len(shape) == 2:
        rank = 64
        left = torch.randn(shape[0], rank, generator=generator)
        right = torch.randn(rank, shape[1], generator=generator)
        weight += (left * torch.arange(1, rank + 1).float() ** -0.7) @ right * 2e-4
    return weight.bfloat16()


def write(folder: Path, layout: dict[str, list[TensorSpec]], tuned: int) -> None:
    """Write one checkpoint, a tensor in memory at a time."""
    folder.mkdir()
    writer = CheckpointWriter(folder, layout, {"format": "pt"})
    for number, (name, _, shape) in enumerate(s for group in layout.values() for s in group):
        writer.write(name, values(number, shape, tuned))
    writer.finish()


def peak(arguments: list[str]) -> dict[str, float]:
    """Run one command; its seconds and peak resident bytes by the system's account."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "deltafold", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"deltafold {' '.join(arguments)} failed")
    return {"seconds": time.perf_counter() - start, "peak_memory_bytes": usage.ru_maxrss * 1024}


def measure(folder: Path, methods: list[str], total_bytes: int) -> Iterator[Record]:
    """One row a method."""
    base, tuned = str(folder / "base"), str(folder / "tuned")
    for method in methods:
        archive, restored = folder / f"{method}.delta", folder / f"{method}.restored"
        compress = peak(["compress", base, tuned, "-o", str(archive), "-m", method])
        restore = peak(["restore", str(archive), "--base", base, "-o", str(restored)])
        archive_record = json.loads(Path(f"{archive}.record.json").read_text())
        shutil.rmtree(archive)
        shutil.rmtree(restored)
        yield {
            "method": method,
            "checkpoint_bytes": total_bytes,
            "file_ratio": archive_record["totals"]["file_ratio"],
            **{f"compress_{key}": value for key, value in compress.items()},
            **{f"restore_{key}": value for key, value in restore.items()},
        }


def measure_merges(folder: Path, methods: list[str], total_bytes: int) -> Iterator[Record]:
    """One row a method of merging, with the workers and memory that it takes by itself."""
    models = [str(folder / name) for name in ("tuned", "other", "third")]
    merged = folder / "merged"
    for method in methods:
        found = peak(["merge", str(folder / "base"), *models, "-o", str(merged), "-m", method])
        shutil.rmtree(merged)
        yield {"method": method, "models": len(models), "checkpoint_bytes": total_bytes, **found}


def table(record: Record) -> str:
    """The record as Markdown tables: archives, then merging."""
    lines = [
        "| method | checkpoint | peak of `compress` | peak of `restore` |",
        "|---|--:|--:|--:|",
    ]
    for row in record["rows"]:
        sizes = [row[key] for key in ("compress_peak_memory_bytes", "restore_peak_memory_bytes")]
        cells = [f"{size / 1e6:,.0f} MB" for size in (row["checkpoint_bytes"], *sizes)]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    if merges := record.get("merges"):
        lines += [
            "",
            "| `merge --method` | fine-tunes | each | peak |",
            "|---|--:|--:|--:|",
        ]
        for row in merges:
            cells = [
                f"{row[key] / 1e6:,.0f} MB" for key in ("checkpoint_bytes", "peak_memory_bytes")
            ]
            lines.append(f"| {row['method']} | {row['models']} | {' | '.join(cells)} |")
    where = [row.get("machine", record["machine"]) for row in record["rows"] + (merges or [])]
    machines = dict.fromkeys(
        f"{each['cores']} cores, {each['memory_bytes'] / 2**30:.0f} GiB, {each['cpu']}"
        for each in where
    )
    note = f"Synthetic sharded checkpoint, bf16; Python included; {'; '.join(machines)}."
    return "\n".join([*lines, "", note])


def add(row: Record, key: str, path: Path) -> None:
    """Put a row into the record, in place of the one of the same method."""
    record = json.loads(path.read_text()) if path.is_file() else {}
    row["machine"] = machine()
    rows = {each["method"]: each for each in record.get(key, [])} | {row["method"]: row}
    fixed: Record = {"record_version": RECORD_VERSION, "kind": "memory", "rows": [], "merges": []}
    write_record(fixed | {"machine": row["machine"]} | record | {key: list(rows.values())}, path)
    print(json.dumps(row), flush=True)


def prepare(folder: Path, gigabytes: float, merges: bool) -> int:
    """Write the checkpoints; returns the bytes of a fine-tune."""
    layout = plan_shards(specs(gigabytes), 10**9)
    for tuned, name in enumerate(("base", "tuned", "other")[: 3 if merges else 2]):
        # In a process of its own: a child's peak would otherwise count this one's memory.
        writer = multiprocessing.get_context("spawn").Process(
            target=write, args=(folder / name, layout, tuned)
        )
        writer.start()
        writer.join()
    if merges:
        shutil.copytree(folder / "tuned", folder / "third", copy_function=os.link)
    return sum(f.stat().st_size for f in (folder / "tuned").iterdir())


def main() -> None:
    """Parse, run, write the record; or write the table from the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    usual = ["lossless", "dare", "magnitude", "impart"]
    parser.add_argument("--methods", nargs="*", default=usual, help="of compress")
    parser.add_argument("--merges", nargs="*", default=["ties", "task-arithmetic"])
    parser.add_argument("--scratch", type=Path, help="folder with room for four checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "memory.json")
    arguments = parser.parse_args()
    if arguments.into:
        record = json.loads(arguments.out.read_text())
        rewrite_block(arguments.into, "memory", table(record))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        total_bytes = prepare(folder, arguments.gigabytes, bool(arguments.merges))
        for row in measure(folder, arguments.methods, total_bytes):
            add(row, "rows", arguments.out)
        for row in measure_merges(folder, arguments.merges, total_bytes):
            add(row, "merges", arguments.out)


if __name__ == "__main__":
    main()
