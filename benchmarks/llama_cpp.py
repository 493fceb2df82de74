"""Adapters of `export --to gguf-lora` in llama.cpp against the restored checkpoints.

    python convert_hf_to_gguf.py BASE --outtype bf16 --outfile base.gguf       # llama.cpp's own
    python benchmarks/llama_cpp.py BASE base.gguf NAME=FINETUNED=ARCHIVE=TASK.jsonl ...
    python benchmarks/llama_cpp.py --into docs/commands/export.md       # the table, from the record

The package `xllamacpp` carries llama.cpp. Every row of a task goes to the base alone, then to the
base with the adapter. Base, fine-tune and restored model answer the same rows through `evaluate`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from adapters import MAX_TOKENS, Reference, Rows, Tune, hits, same

from deltafold import export
from deltafold.reporting.markdown import rewrite_block
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

OUT = Path(__file__).parent / "records" / "llama-cpp.json"


def llama(model: str, adapters: list[str], threads: int) -> Any:
    """llama.cpp with a model and adapters."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = model
    asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path) for path in adapters]
    asked.n_ctx, asked.n_parallel, asked.cpuparams.n_threads = 512, 1, threads
    asked.warmup, asked.verbosity, asked.port = False, 0, 0
    return xllamacpp.Server(asked)


def answers(engine: Any, rows: Rows) -> list[str]:
    """Greedy completions, up to a line break."""
    wish = {"max_tokens": MAX_TOKENS, "temperature": 0, "stop": ["\n"]}
    made = [engine.handle_completions({"prompt": row.prompt} | wish) for row in rows]
    return [str(each["choices"][0]["text"]) for each in made]


def measure(tune: Tune, asked: argparse.Namespace, scratch: Path) -> Record:
    """One row: the adapter exported, then base and base + adapter asked."""
    path = scratch / f"{tune.name}.gguf"
    made = export(tune.archive, path, "gguf-lora", base=asked.base, rank=asked.rank)
    rows = tune.rows(asked.limit)
    alone = answers(llama(asked.base_gguf, [], asked.threads), rows)
    texts = answers(llama(asked.base_gguf, [str(path)], asked.threads), rows)
    reference = Reference.measure(asked.base, tune, asked.limit)
    return {
        "name": tune.name,
        **reference.row(),
        "dtype": reference.dtype,
        "engine_base": hits(alone, rows),
        "engine_adapter": hits(texts, rows),
        "same_as_restored": same(texts, reference.texts),
        "adapter_bytes": made["adapter_bytes"],
        "largest_rank": made["largest_rank"],
        "method": made["method"],
        "relative_error": made["relative_error"],
        "relative_error_of_pairs": made["relative_error_of_pairs"],
    }


def table(record: Record) -> str:
    """The record as a Markdown table."""
    lines = [
        "| task | fine-tune | restored | llama.cpp, base + adapter | the same answer as restored "
        "| llama.cpp, base alone | error of the delta | of pairs alone |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    keys = ("finetuned", "restored", "engine_adapter", "same_as_restored", "engine_base")
    for row in record["rows"]:
        shown = " | ".join(f"{100 * row[key]:.1f} %" for key in keys)
        errors = f"{row['relative_error']:.3f} | {row['relative_error_of_pairs']:.3f}"
        lines.append(f"| {row['name']} | {shown} | {errors} |")
    used, first = record["settings"], record["rows"][0]
    sizes = ", ".join(f"{row['adapter_bytes'] / 1e6:.0f} MB" for row in record["rows"])
    note = (
        f"Share of {used['limit']} held-out rows answered to the letter by fine-tunes of "
        f"{used['base']}. Archives: `{first['method']}`; adapters of {sizes}, of rank "
        f"{max(row['largest_rank'] for row in record['rows'])} at most. Base in GGUF: "
        f"{used['base_gguf_type']}; fine-tune and restored: {first['dtype']}. llama.cpp of "
        f"xllamacpp {record['engine']}, {record['machine']['cpu']}."
    )
    return "\n".join([*lines, "", note])


def stored_type(path: str) -> str:
    """The type in which a GGUF file holds its matrices."""
    import gguf

    kinds = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1}
    return " and ".join(sorted(kinds))


def main() -> None:
    """Parse, export, ask, compare, write the record; or the table from the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?")
    parser.add_argument("base_gguf", nargs="?")
    parser.add_argument("tunes", nargs="*", type=Tune.parse, metavar="NAME=FINETUNED=ARCHIVE=TASK")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    asked = parser.parse_args()
    if asked.into:
        rewrite_block(asked.into, "llama-cpp", table(json.loads(asked.out.read_text())))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(tune, asked, Path(scratch)) for tune in asked.tunes]
    record: Record = {
        "record_version": RECORD_VERSION,
        "kind": "llama-cpp",
        "engine": importlib.metadata.version("xllamacpp"),
        "rows": rows,
        "settings": {
            "base": Path(asked.base).name,
            "base_gguf_type": stored_type(asked.base_gguf),
            "rank": asked.rank,
            "limit": asked.limit,
        },
        "machine": machine(),
    }
    write_record(record, asked.out)
    print(table(record))


if __name__ == "__main__":
    main()
