"""Several full fine-tunes of one base merged into one: what is left of each, by method.

    python benchmarks/merging.py smollm2                    # goes on where it stopped
    python benchmarks/merging.py demo
    python benchmarks/merging.py smollm2 --into docs/commands/merge.md

Each row is one merge: a consensus, a sparsifier, and where the models come from: whole checkpoints, or
archives of `auto` at file ratio 32. The scale is searched on rows that are in no test. Then the
merged model answers the held-out rows of every task, as each single fine-tune does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import DEMO
from smollm2 import default_cache
from tasks import make_rows, write_jsonl

import deltafold
from deltafold.errors import DeltafoldError
from deltafold.evaluation.request import Measuring
from deltafold.evaluation.scoring import Scoring
from deltafold.merging.recipe import Model, Recipe
from deltafold.reporting.markdown import page, rewrite_block
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import MISSING, percent_text, seconds_text
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
METHODS = ("task-arithmetic", "ties")
SPARSIFIERS = ("none", "dare", "impart")
SCALES = (0.3, 0.5, 0.7, 1.0)
FILE_RATIO = 32
SEARCH_ROWS, SEARCH_SEED = 24, 3
BATCH_ROWS = 25


@dataclass(frozen=True)
class Family:
    """A base, its fine-tunes by task, held-out rows of each task, rows to search on."""

    model: str
    base: Path
    finetunes: dict[str, Path]
    tests: dict[str, Path]
    searches: dict[str, Path]


def family(name: str, cache: Path) -> Family:
    """The folders of a family; rows to search on are written into the cache."""
    if name == "demo":
        names = ("add", "sort")
        tests = {n: DEMO / "tasks" / f"{n}.jsonl" for n in names}
        searches = {n: tail(tests[n], cache / "tasks" / f"demo-{n}.search.jsonl") for n in names}
        models = DEMO / "models"
        size = "demo family (3.2 M parameters, bf16)"
        return Family(size, models / "base", {n: models / n for n in names}, tests, searches)
    names = ("arithmetic", "extraction", "sorting")
    searches = {}
    for task in names:
        searches[task] = cache / "tasks" / f"{task}.search.jsonl"
        write_jsonl(make_rows(task, "train", SEARCH_ROWS, SEARCH_SEED), searches[task])
    finetunes = {n: cache / f"smollm2-{n}" for n in names}
    for folder in finetunes.values():
        if not folder.is_dir():
            raise DeltafoldError(f"{folder} is missing; run smollm2.py prepare --fine-tune first.")
    tests = {n: cache / "tasks" / f"{n}.test.jsonl" for n in names}
    size = "SmolLM2-135M-Instruct (134.5 M parameters, bf16, tied embeddings)"
    return Family(size, cache / "smollm2-base", finetunes, tests, searches)


def tail(path: Path, into: Path) -> Path:
    """The last rows of a file, which the test does not use."""
    rows = path.read_text(encoding="utf-8").splitlines()[-SEARCH_ROWS:]
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return into


def measure(these: Family, name: str, rows: int, out: Path, scratch: Path) -> None:
    """Measure what the record lacks; it is written after each merge."""
    record = opened(out, these, name, rows)
    request = Measuring(
        tasks=(*these.tests.values(),), batch_size=BATCH_ROWS, limit=rows, answers=0
    )
    scoring = Scoring(request, torch.float32)
    if not record["singles"]:
        for label, folder in [("base", these.base), *these.finetunes.items()]:
            record["singles"][label] = shares(scoring.of_source(label, folder, these.base))
            print(label, record["singles"][label], flush=True)
        write_record(record, out)
    for source in ("checkpoints", "archives"):
        for method in METHODS:
            for sparsifier in SPARSIFIERS:
                key = {"source": source, "method": method, "sparsifier": sparsifier}
                if any(all(row[k] == key[k] for k in key) for row in record["rows"]):
                    continue
                models = folders(these, source, scratch)
                row = key | merged(these, models, method, sparsifier, scoring)
                record["rows"].append(row)
                write_record(record, out)
                print(row, flush=True)


def opened(out: Path, these: Family, name: str, rows: int) -> Record:
    if out.is_file():
        found: Record = json.loads(out.read_text(encoding="utf-8"))
        if found["settings"]["rows"] == rows:
            return found
    return {
        "record_version": RECORD_VERSION,
        "kind": "merging-benchmark",
        "family": name,
        "model": these.model,
        "settings": {"rows": rows, "search_rows": SEARCH_ROWS, "scales": list(SCALES),
                     "file_ratio": FILE_RATIO, "dtype": "fp32"},
        "singles": {},
        "rows": [],
        "machine": machine(),
    }  # fmt: skip


def folders(these: Family, source: str, scratch: Path) -> list[Path]:
    """The fine-tunes, or archives of them, which are made when first asked for."""
    if source == "checkpoints":
        return list(these.finetunes.values())
    found = []
    for name, folder in these.finetunes.items():
        archive = scratch / f"{name}.delta"
        if not archive.is_dir():
            deltafold.compress(these.base, folder, archive, file_ratio=FILE_RATIO)
        found.append(archive)
    return found


def merged(
    these: Family, models: list[Path], method: str, sparsifier: str, scoring: Scoring
) -> dict[str, Any]:
    """One merge: its scale, its scores, its seconds (the search is not counted in)."""
    recipe = Recipe(tuple(Model(str(each)) for each in models), method, sparsifier)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "merged"
        searched = deltafold.merge(
            recipe,
            folder,
            base=these.base,
            search={"scale": SCALES},
            search_on=list(these.searches.values()),
            batch_size=BATCH_ROWS,
            dtype="fp32",
        )
        scores = shares(scoring.of_source("merged", folder, these.base))
        scale = searched["recipe"]["scale"]
        start = time.perf_counter()
        again = Recipe(recipe.models, method, sparsifier, scale=scale)
        deltafold.merge(again, Path(name) / "again", base=these.base)
        seconds = time.perf_counter() - start
    tried = [
        {"scale": row["settings"]["scale"], "share_right": row.get("share_right")}
        for row in searched["search"]["tried"]
    ]
    return {"scale": scale, "tried": tried, "scores": scores, "merge_seconds": seconds}


def shares(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name.split(".")[0]: figures["exact_match"] for name, figures in metrics["tasks"].items()
    }


# --- the table --------------------------------------------------------------------------------


def table(record: Record) -> Table:
    """Models by tasks: singles first, then each merge; the best mean of each source in bold."""
    tasks = list(record["singles"]["base"])
    rows: list[list[Cell]] = []
    for label, figures in record["singles"].items():
        rows.append([label, "", "", *cells(figures, tasks), MISSING])
    for source in ("checkpoints", "archives"):
        these = [row for row in record["rows"] if row["source"] == source]
        best = max((mean(row["scores"]) for row in these), default=0.0)
        for row in these:
            name = f"{row['method']}, {row['sparsifier']}"
            line = [name, source, f"{row['scale']:g}", *cells(row["scores"], tasks)]
            shown: list[Cell] = [*line, seconds_text(row["merge_seconds"])]
            if mean(row["scores"]) == best:
                shown[-2] = Strong(str(shown[-2]))
            rows.append(shown)
    settings = record["settings"]
    names = ", ".join(name for name in record["singles"] if name != "base")
    note = (
        f"Share of {settings['rows']} held-out rows of each task that are right; after ±, one "
        f"standard error. Merged: {names}. Archives: auto at file ratio {settings['file_ratio']}. "
        f"Scale: chosen of {', '.join(f'{s:g}' for s in settings['scales'])} on "
        f"{settings['search_rows']} other rows of each task. Density: the method's own."
    )
    about = record["machine"]
    where = (
        f"Model: {record['model']}. Machine: {about['cpu']}, {about['cores']} cores, "
        f"deltafold {about['deltafold']}."
    )
    columns = ("model", "from", "scale", *tasks, "mean", "merging")
    title = f"{record['model'].split(' (')[0]}: {len(tasks)} fine-tunes in one model"
    return Table(title, columns, rows, notes=[note, where], left=2, keys=2)


def mean(figures: dict[str, Any]) -> float:
    return sum(each["value"] for each in figures.values()) / len(figures)


def cells(figures: dict[str, Any], tasks: list[str]) -> list[str]:
    shown = [percent_text(figures[t]["value"], figures[t]["stderr"]) for t in tasks]
    return [*shown, percent_text(mean(figures))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=("demo", "smollm2"))
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of each task")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--scratch", type=Path, help="where archives are kept for the next try")
    parser.add_argument("--record", type=Path, help="default: records/merging-FAMILY.json")
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    options = parser.parse_args()
    out = options.record or HERE / "records" / f"merging-{options.family}.json"
    if options.into:
        made = table(json.loads(out.read_text(encoding="utf-8")))
        rewrite_block(options.into, f"merging-{options.family}", page([made]))
        return 0
    scratch = options.scratch or options.cache / f"merging-{options.family}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        measure(family(options.family, options.cache), options.family, options.rows, out, scratch)
    except DeltafoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
