"""The same merges by mergekit and by deltafold, each from the same YAML file, weight by weight.

    python benchmarks/mergekit.py                           # tiny Llama models, fp32 and bf16
    python benchmarks/mergekit.py --base demo/models/base --models A B     # and real folders
    python benchmarks/mergekit.py --into docs/commands/merge.md            # the table

mergekit is installed into an environment of its own under the cache folder; nothing of it is
imported here. Methods without chance are compared entry by entry, `dare_ties` by its statistics.
The record goes to `benchmarks/records/mergekit.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from cells import run
from differences import compare
from smollm2 import default_cache
from transformers import LlamaConfig, LlamaForCausalLM

from deltafold.reporting.markdown import rewrite_block
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
VERSION = "0.1.5"
BLOCKS, WIDTH = 4, 64
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What mergekit is told of types: fp32 throughout, fp32 within, or its usual, the stored type.
DTYPES: dict[tuple[str, str], dict[str, str]] = {
    ("fp32", "fp32"): {"dtype": "float32"},
    ("bf16", "fp32"): {"dtype": "float32", "out_dtype": "bfloat16"},
    ("bf16", "bf16"): {"dtype": "bfloat16"},
}
GRADIENT: list[float] = [0.2, 0.5, 0.8]
FILTERS: list[dict[str, Any]] = [
    {"filter": "self_attn", "value": GRADIENT},
    {"filter": "down_proj", "value": 0.9},
    {"value": 0.5},
]


@dataclass(frozen=True)
class File:
    """One YAML file: a name for the table, mergekit's method, parameters of all and of each."""

    name: str
    method: str
    shared: dict[str, Any]
    each: tuple[dict[str, Any], ...] = ({}, {})


FILES = (
    File("linear", "linear", {}, ({"weight": 0.7}, {"weight": 0.4})),
    File("task_arithmetic", "task_arithmetic", {"lambda": 0.8}, ({"weight": 0.7}, {"weight": 0.4})),
    File("ties", "ties", {"lambda": 0.9, "density": 0.4}, ({"weight": 1.0}, {"weight": 0.6})),
    File("ties, no density", "ties", {"weight": 0.5}),
    File("ties, gradient and filters", "ties", {"normalize": False},
         ({"weight": GRADIENT, "density": FILTERS}, {"weight": FILTERS, "density": 0.3})),
    File("slerp", "slerp", {"t": 0.4}),
    File("slerp, gradient and filters", "slerp", {"t": FILTERS}),
    File("dare_ties", "dare_ties", {}, ({"weight": 0.7, "density": 0.5},
                                        {"weight": 0.6, "density": 0.3})),
)  # fmt: skip
RANDOM = ("dare_ties",)
COLUMNS = ("models", "file", "stored", "computed")  # that tell rows apart


def environment(cache: Path) -> Path:
    """The folder of programs of mergekit's own environment, made when it is not there."""
    folder = cache / f"mergekit-{VERSION}"
    programs = folder / "bin"
    if not (programs / "mergekit-yaml").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip: list[str | Path] = [programs / "python", "-m", "pip", "install", "--quiet"]
        pinned: list[str | Path] = [
            "-c",
            HERE.parent / "constraints.txt",
            "torch",
            f"mergekit=={VERSION}",
        ]
        subprocess.run([*pip, *pinned], check=True)
    return programs


def versions(programs: Path) -> dict[str, str]:
    """Versions in mergekit's environment."""
    names = ("mergekit", "torch", "transformers")
    code = f"from importlib.metadata import version as v; print(*map(v, {names}))"
    done = subprocess.run(
        [programs / "python", "-c", code], check=True, capture_output=True, text=True
    )
    return dict(zip(names, done.stdout.split(), strict=True))


def write_models(folder: Path, stored: str) -> list[Path]:
    """A tiny Llama base and two fine-tunes: matrices moved by a tenth of their size, norms less."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    found = []
    for number, name in enumerate(("base", "one", "two")):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                size = (0.1 if parameter.dim() > 1 else 0.01) * parameter.square().mean().sqrt()
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += bool(number) * size * noise
        model.to(STORED[stored]).save_pretrained(folder / name)
        found.append(folder / name)
    return found


def text(file: File, models: list[Path], dtypes: dict[str, str]) -> str:
    """The YAML file."""
    base, *tuned = models
    entries: list[dict[str, Any]] = [
        {"model": str(path)} | ({"parameters": own} if own else {})
        for path, own in zip(tuned, file.each, strict=True)
    ]
    if file.method == "slerp":
        base, entries = tuned[0], entries[:2]
    whole = {"merge_method": file.method, "models": entries, "parameters": file.shared, **dtypes}
    if file.method != "linear":
        whole["base_model"] = str(base)
    return yaml.safe_dump(whole, sort_keys=False)


def measure(
    label: str,
    models: list[Path],
    kinds: list[tuple[str, str]],
    programs: Path,
    done: list[tuple[str, ...]],
) -> Iterator[Record]:
    """One row a file and a pair of types, for those that are not done."""
    for stored, computed in kinds:
        for file in FILES:
            if (label, file.name, stored, computed) in done:
                continue
            with tempfile.TemporaryDirectory() as name:
                config = Path(name) / "merge.yaml"
                config.write_text(text(file, models, DTYPES[stored, computed]), encoding="utf-8")
                theirs, ours = Path(name) / "mergekit", Path(name) / "deltafold"
                program = [programs / "mergekit-yaml", config, theirs]
                options = ["--no-copy-tokenizer", "--quiet", "--random-seed", "0"]
                quiet = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
                subprocess.run([*program, *options], check=True, env=quiet)
                run(["merge", "--config", str(config), "-o", str(ours)], quiet=True)
                found = compare(models, theirs, ours, file.method in RANDOM)
            yield {"models": label, "file": file.name, "method": file.method,
                   "stored": stored, "computed": computed, **found}  # fmt: skip


def table(record: Record) -> str:
    """The record as two Markdown tables."""
    lines = [
        "| file | models | stored, computed in | equal in every bit | within one rounding step "
        "| largest difference | differences / merged delta |",
        "|:--|:--|:--|--:|--:|--:|--:|",
    ]
    chance = [
        "| file | models | stored, computed in | norm of merged delta | entries changed |",
        "|:--|:--|:--|--:|--:|",
    ]
    for row in record["rows"]:
        name, kind = f"`{row['file']}`", f"{row['stored']}, {row['computed']}"
        start = f"| {name} | {row['models']} | {kind} |"
        if row["method"] in RANDOM:
            norms = f"{row['mergekit_norm']:.4g}, {row['deltafold_norm']:.4g}"
            moved = f"{row['mergekit_density']:.1%}, {row['deltafold_density']:.1%}"
            chance.append(f"{start} {norms} | {moved} |")
        else:
            shares = f"{row['equal']:.2%} | {row['within_rounding']:.3%}"
            shares += f" | {row['max_difference']:.1e}"
            lines.append(f"{start} {shares} | {row['relative_difference']:.1e} |")
    found = record["versions"]
    note = (
        f"mergekit {found['mergekit']} and deltafold {record['machine']['deltafold']}, torch "
        f"{found['torch']}, on a CPU. `computed in` is mergekit's arithmetic; deltafold's is fp32."
    )
    between = "Where entries are drawn, mergekit's figure and then deltafold's:"
    return "\n".join([*lines, "", between, "", *chance, "", note])


def benchmark(arguments: argparse.Namespace) -> None:
    """Run what is not in the record yet; the record is written after each merge."""
    programs = environment(arguments.cache)
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "mergekit",
        "versions": versions(programs),
        "rows": [],
        "machine": machine(),
    }
    if arguments.out.is_file() and not arguments.fresh:
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    done = [tuple(row[key] for key in COLUMNS) for row in record["rows"]]
    with tempfile.TemporaryDirectory() as name:
        wanted = [
            ("tiny Llama", write_models(Path(name) / stored, stored),
             [kind for kind in DTYPES if kind[0] == stored])
            for stored in STORED
        ]  # fmt: skip
        if arguments.models:
            models = [arguments.base, *arguments.models]
            wanted.append((arguments.label, models, [("bf16", "fp32")]))
        for label, models, kinds in wanted:
            for row in measure(label, models, kinds, programs, done):
                record["rows"].append(row)
                write_record(record, arguments.out)
                print(json.dumps(row), flush=True)


def main() -> None:
    """Parse, run, write the record; or write the table from the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--base", type=Path, help="a real base, bf16")
    parser.add_argument("--models", type=Path, nargs=2, help="two fine-tunes of it")
    parser.add_argument("--label", default="demo family", help="what the table calls them")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "mergekit.json")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    arguments = parser.parse_args()
    if arguments.into:
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
        rewrite_block(arguments.into, "mergekit", table(record))
    else:
        benchmark(arguments)


if __name__ == "__main__":
    main()
