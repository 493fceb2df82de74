"""Every way to factor a model, at two sizes: what is saved, what it costs.

    python benchmarks/factoring.py                       # goes on where it stopped
    python benchmarks/factoring.py demo                  # the small model of the demo, in a minute
    python benchmarks/factoring.py --into docs/commands/factor.md

`smollm2` is SmolLM2-135M-Instruct (`smollm2.py prepare`). Factors are fitted to the pages that come
with deltafold; what is measured is the text that `folding.py` measures on, the topics of
Python's own help: perplexity, KL from the whole model and agreement with it, of the folder as written.
`demo` is fitted to pages of the demo's training text and measured on its held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from folding import DTYPE, MAX_LENGTH, WINDOWS, remember, write_data
from smollm2 import default_cache

from deltafold.calibration.models import quiet
from deltafold.errors import DeltafoldError
from deltafold.evaluation.before_after import weight_bytes
from deltafold.evaluation.loading import end_token_ids, load_tokenizer, loaded
from deltafold.evaluation.plan import Plan
from deltafold.evaluation.request import Measuring
from deltafold.evaluation.segments import Subject
from deltafold.factoring.factor import factor
from deltafold.reporting.markdown import page, rewrite_block
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    kl_text,
    number_text,
    percent_text,
    seconds_text,
)
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
SHARES = (0.8, 0.6)
SAMPLES = 128
DEMO = HERE.parent / "demo"
DEMO_PAGES = 200
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct (134.5 M parameters, bf16, tied embeddings)",
    "demo": "the demo's base (3.2 M parameters, bf16, tied embeddings)",
}
ABOUT = {
    "smollm2": f"Factors fitted to {SAMPLES} samples of the pages that come with deltafold. Measured on "
    "Python's help, in bf16. "
    "Embeddings are 28.3 M of the parameters and stay as they are.",
    "demo": f"Factors fitted to {DEMO_PAGES} pages of the demo's training text. Measured on its "
    "held-out text.",
}
# label -> method and settings beside the defaults
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {}),
    "welore": ("welore", {}),
    "lord": ("lord", {}),
    "basis-sharing": ("basis-sharing", {}),
    "bolaco": ("bolaco", {"trials": 8}),
    "lord, model's own inputs": ("lord", {"sequential": False}),
    "lord, centred": ("lord", {"centre": True}),
    "basis-sharing, alike": ("basis-sharing", {"grouping": "alike"}),
}


class Bench:
    """The whole model in memory, and the windows of text that all are compared on."""

    def __init__(self, model: Path, whole: Subject, text: Path, calibration: str):
        tokenizer = load_tokenizer(model)
        request = Measuring(texts=(text,), batch_size=1, max_length=MAX_LENGTH, answers=0)
        self.plan = Plan(request, tokenizer, end_token_ids(model, tokenizer))
        self.plan.cut_texts(whole)
        assert self.plan.texts is not None
        cut = self.plan.texts.segments[:: max(1, len(self.plan.texts.segments) // WINDOWS)]
        object.__setattr__(self.plan.texts, "segments", cut[:WINDOWS])
        self.model, self.whole, self.calibration = model, whole, calibration
        remember(whole.model)

    def figures(self, subject: Subject) -> Record:
        """What a table shows of a model; the whole one has no KL from itself."""
        teacher = None if subject is self.whole else self.whole
        found = self.plan.measure(subject, teacher, lambda line: None)
        figures = {"perplexity": found["perplexity"]}
        if teacher is not None:
            figures |= {"kl": found["kl_text"], "agreement": found["agreement_text"]}
        return figures


def texts(model: str, folder: Path) -> tuple[Path, str]:
    """(text to measure on, calibration): never the same text."""
    if model == "smollm2":
        return write_data(folder)[1], "pages"
    sys.path.insert(0, str(DEMO))
    from data import DOCUMENTS_A_PAGE
    from world import documents

    found = documents(0, "train", DEMO_PAGES * DOCUMENTS_A_PAGE, frozenset())
    pages = [found[n : n + DOCUMENTS_A_PAGE] for n in range(0, len(found), DOCUMENTS_A_PAGE)]
    path = folder / "pages.jsonl"
    path.write_text("\n".join(json.dumps({"text": "\n".join(each)}) for each in pages) + "\n")
    return DEMO / "tasks" / "text.txt", str(path)


def run(bench: Bench, record: Record, out: Path, options: argparse.Namespace) -> None:
    """Measure what the record lacks; it is written after each cell."""
    if not record["whole"]:
        record["whole"] = bench.figures(bench.whole) | {"weight_bytes": weight_bytes(bench.model)}
        write_record(record, out)
    for label in options.ways:
        for share in options.shares:
            if any((row["way"], row["share"]) == (label, share) for row in record["rows"]):
                continue
            record["rows"].append({"way": label, "share": share} | cell(bench, label, share))
            write_record(record, out)
            print(json.dumps(record["rows"][-1]), flush=True)


def cell(bench: Bench, label: str, share: float) -> Record:
    """One factored model, and what it is worth."""
    method, settings = WAYS[label]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "factored"
        try:
            made = factor(
                bench.model, folder, method, parameters=share, samples=SAMPLES,
                **({"calibration": bench.calibration} | settings),
            )  # fmt: skip
        except DeltafoldError as error:
            return {"unmet": str(error)}
        with quiet(), loaded("factored", folder, None, DTYPE, "cpu") as subject:
            figures = bench.figures(subject)
        return figures | {
            "method": made["method"]["name"],
            "settings": made["settings"]
            | {"calibration": Path(made["settings"]["calibration"]).name},
            "parameters": made["parameters"],
            "roles": made["roles"],
            "samples": made["samples"],
            "search": made["search"],
            "weight_bytes": weight_bytes(folder),
            "factor_seconds": made["seconds"],
            "peak_memory_bytes": made["peak_memory_bytes"],
        }


# --- the tables -------------------------------------------------------------------------------


def tables(record: Record) -> list[Table]:
    """One a share, least perplexity first."""
    made = []
    for share in sorted({row["share"] for row in record["rows"]}, reverse=True):
        found = [row for row in record["rows"] if row["share"] == share and "unmet" not in row]
        found.sort(key=lambda row: row["perplexity"]["value"])
        rows = [line("whole model", record["whole"])]
        rows += [line(row["way"], row, best=row is found[0]) for row in found]
        columns = ("method", "perplexity", "KL", "agreement", "parameters", "rank share", "weights",
                   "factoring", "peak memory")  # fmt: skip
        made.append(Table(f"{share:.0%} of parameters", columns, rows))
    about = record["machine"]
    made[-1].notes += [
        f"Model: {record['model']}. {record['about']} At most {WINDOWS} windows of {MAX_LENGTH} "
        "tokens; KL and agreement: with the whole model. After ±: one standard error. Bold: least "
        "perplexity. Weights: bytes of the weight file.",
        f"Machine: {about['cpu']}, one core of {about['cores']}, shared with other work, so seconds "
        f"are upper bounds; deltafold {about['deltafold']}. " + record.get("remark", ""),
    ]
    return made


def line(name: str, row: Record, best: bool = False) -> list[Cell]:
    parameters = row.get("parameters")
    cells = [
        name,
        number_text(row["perplexity"]["value"], row["perplexity"]["stderr"]),
        kl_text(row["kl"]["value"], row["kl"]["stderr"]) if "kl" in row else MISSING,
        percent_text(row["agreement"]["value"]) if "agreement" in row else MISSING,
        f"{parameters['kept'] / 1e6:.1f} M" if parameters else MISSING,
        percent_text(parameters["rank_share"]) if parameters else MISSING,
        bytes_text(row["weight_bytes"]),
        seconds_text(row["factor_seconds"]) if "factor_seconds" in row else MISSING,
        bytes_text(row["peak_memory_bytes"]) if "peak_memory_bytes" in row else MISSING,
    ]
    return [Strong(each) if best and n < 2 else each for n, each in enumerate(cells)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--record", type=Path, help="Default: records/factoring-MODEL.json")
    parser.add_argument("--into", type=Path, help="Markdown file: write tables, measure nothing")
    options = parser.parse_args()
    options.record = options.record or HERE / "records" / f"factoring-{options.model}.json"
    if options.into:
        record = json.loads(options.record.read_text(encoding="utf-8"))
        rewrite_block(options.into, f"factoring-{options.model}", page(tables(record)))
        return 0
    record = {
        "record_version": RECORD_VERSION, "kind": "factoring-benchmark", "whole": {}, "rows": [],
    }  # fmt: skip
    if options.record.is_file():
        record = json.loads(options.record.read_text(encoding="utf-8"))
    record |= {"machine": machine(), "model": MODELS[options.model], "about": ABOUT[options.model]}
    model = options.cache / "smollm2-base" if options.model == "smollm2" else DEMO / "models/base"
    try:
        with (
            quiet(),
            tempfile.TemporaryDirectory() as name,
            loaded("whole", model, None, DTYPE, "cpu") as whole,
        ):
            bench = Bench(model, whole, *texts(options.model, Path(name)))
            run(bench, record, options.record, options)
    except DeltafoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
