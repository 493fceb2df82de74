"""Every way to fold a model, at several depths: what is saved, what it costs.

    python benchmarks/folding.py                       # goes on where it stopped
    python benchmarks/folding.py --into docs/commands/fold.md
    python benchmarks/folding.py --join a.json b.json      # records of parts become one
    python benchmarks/folding.py --again come laco         # rows of these are measured anew

The model is SmolLM2-135M-Instruct (`smollm2.py prepare`). Blocks are chosen and healed on the pages
that come with deltafold; what is measured is other text: the topics of Python's own help for
perplexity and KL from the whole model, and records to read a field from, with three solved examples
before each, as a multiple choice and as a generative task with exact answers.
"""

from __future__ import annotations

import argparse
import functools
import json
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from joining import join
from smollm2 import default_cache
from tasks import Row, make_rows, write_jsonl

import deltafold
from deltafold.calibration.models import quiet
from deltafold.errors import DeltafoldError
from deltafold.evaluation.before_after import speed
from deltafold.evaluation.loading import end_token_ids, load_tokenizer, loaded
from deltafold.evaluation.plan import Plan
from deltafold.evaluation.request import Measuring
from deltafold.evaluation.segments import Subject
from deltafold.folding.methods.presets import METHODS
from deltafold.reporting.markdown import page, rewrite_block
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import MISSING, kl_text, number_text, percent_text, seconds_text
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record

HERE = Path(__file__).parent
BLOCKS = (2, 4, 6, 8)
HEALED = (
    "mka",
    "angular",
    "reverse",
    "random",
)  # also healed as `auto` is, which is shortgpt healed
TRAINED, STEPS = ("auto",), 30  # also trained afterwards
ROWS, CHOICES, SHOTS, WINDOWS, MAX_LENGTH = 24, 16, 3, 24, 256
OPTIONS = 4  # of a multiple choice, at most
SAMPLES = 256
DTYPE = torch.bfloat16  # to measure in
PROGRAMS = {
    ("come", 2): 20.0, ("come", 4): 26.7, ("come", 6): 68.5, ("laco-reference", 6): 5563.0,
    ("mka-reference", 2): 2003.0, ("reverse", 2): 903.0, ("linearpatch-scale", 6): 31.6,
}  # fmt: skip
"""Perplexity that the arithmetic of the papers' released programs gave on this model, on a like text."""
TOPICS = ("types", "strings", "specialnames", "execmodel", "import", "with", "async", "class")


def write_data(folder: Path) -> tuple[list[Path], Path]:
    """(task files, text): made anew from seeds and from what Python brings along."""
    shots = make_rows("extraction", "train", SHOTS, 7)
    rows = make_rows("extraction", "test", ROWS, 2)
    before = "\n\n".join(row["prompt"] + row["answer"] for row in shots) + "\n\n"
    exact: list[Row] = [{"prompt": before + r["prompt"], "answer": r["answer"]} for r in rows]
    write_jsonl(exact, folder / "extraction.jsonl")
    choices = folder / "choice.jsonl"
    lines = []
    for row in exact[:CHOICES]:
        record = row["prompt"].rsplit("Record: ", 1)[1].split(".\n")[0]
        values = [" " + pair.split(" = ")[1] for pair in record.split(", ")]
        at = values.index(row["answer"])
        values = values[max(0, at - OPTIONS + 1) :][:OPTIONS]
        options = {"choices": values, "answer": values.index(row["answer"])}
        lines.append(json.dumps({"prompt": row["prompt"], **options}))
    choices.write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = folder / "help.txt"
    found = pydoc_data.topics.topics
    text.write_text("\n\n".join(found[name] for name in TOPICS if name in found), encoding="utf-8")
    return [choices, folder / "extraction.jsonl"], text


def remember(model: Any) -> None:
    """Keep the logits that a model gives: those of the whole model are the same for every candidate."""
    forward, held = model.forward, {}

    @functools.wraps(forward)
    def remembered(*, input_ids: torch.Tensor, **more: Any) -> Any:
        if more.get("past_key_values") is not None or more.get("use_cache"):
            return forward(input_ids=input_ids, **more)  # generation: ids are not all it depends on
        key = input_ids.numpy().tobytes()
        if key not in held:
            held[key] = forward(input_ids=input_ids, **more)
        return held[key]

    model.forward = remembered


class Bench:
    """The whole model in memory, with what it is compared on."""

    def __init__(self, model: Path, whole: Subject, folder: Path):
        tasks, text = write_data(folder)
        tokenizer = load_tokenizer(model)
        request = Measuring(
            tasks=tasks, texts=(text,), batch_size=20, max_length=MAX_LENGTH, answers=0
        )
        self.plan = Plan(request, tokenizer, end_token_ids(model, tokenizer))
        self.plan.cut_texts(whole)
        assert self.plan.texts is not None
        cut = self.plan.texts.segments[:: max(1, len(self.plan.texts.segments) // WINDOWS)]
        object.__setattr__(self.plan.texts, "segments", cut[:WINDOWS])
        self.model, self.whole = model, whole
        remember(whole.model)

    def figures(self, subject: Subject) -> Record:
        """What a table shows of a model; the whole one has no KL from itself."""
        teacher = None if subject is self.whole else self.whole
        found = self.plan.measure(subject, teacher, lambda line: None)
        figures = {
            "perplexity": found["perplexity"],
            "choice": found["tasks"]["choice"]["accuracy"],
            "exact_match": found["tasks"]["extraction"]["exact_match"],
            "tokens_per_second": speed(subject),
            "parameters": sum(p.numel() for p in subject.model.parameters()),
        }
        if teacher is not None:
            figures |= {"kl": found["kl_text"], "agreement": found["agreement_text"]}
        return figures


def run(bench: Bench, record: Record, out: Path, options: argparse.Namespace) -> None:
    """Measure what the record lacks; it is written after each cell."""
    if not record["whole"]:
        record["whole"] = bench.figures(bench.whole)
        write_record(record, out)
    for blocks in options.blocks:
        for method in options.methods:
            for healing in healings(method):
                if options.healings and (healing or "none") not in options.healings:
                    continue
                key = {"method": method, "blocks": blocks, "healing": healing}
                if any(all(row[k] == key[k] for k in key) for row in record["rows"]):
                    continue
                record["rows"].append(key | cell(bench, method, blocks, healing))
                write_record(record, out)
                print(json.dumps(record["rows"][-1]), flush=True)


def healings(method: str) -> list[str | None]:
    """Ways to heal that are measured: as the method does by itself, in closed form, trained."""
    through = ["through"] * (method in HEALED)
    trained = ["trained"] * (method in TRAINED)
    return [None, *through, *trained]


def key_of(row: Record) -> tuple[str, int, str | None]:
    """What tells one row from another."""
    return row["method"], row["blocks"], row["healing"]


def place_of(row: Record) -> tuple[int, int, str]:
    """Where a row stands in the record: by depth, and as methods are listed."""
    return row["blocks"], list(METHODS).index(row["method"]), row["healing"] or ""


def cell(bench: Bench, method: str, blocks: int, healing: str | None) -> Record:
    """One fold, and what it is worth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "folded"
        try:
            made = deltafold.fold(
                bench.model, folder, method, blocks=blocks, samples=SAMPLES,
                closed_form="through" if healing else None,
                heal=STEPS if healing == "trained" else 0,
            )  # fmt: skip
        except DeltafoldError as error:
            return {"unmet": str(error)}
        with quiet(), loaded("folded", folder, None, DTYPE, "cpu") as subject:
            figures = bench.figures(subject)
    return figures | {
        "removed": made["removed"],
        "fold_seconds": made["seconds"],
        "peak_memory_bytes": made["peak_memory_bytes"],
    }


# --- the tables -------------------------------------------------------------------------------


def tables(record: Record) -> list[Table]:
    """One a depth, least perplexity first."""
    made = []
    for blocks in sorted({row["blocks"] for row in record["rows"]}):
        found = [row for row in record["rows"] if row["blocks"] == blocks and "unmet" not in row]
        found.sort(key=lambda row: row["perplexity"]["value"])
        rows = [line("whole model", record["whole"])]
        rows += [line(name_of(row), row, best=row is found[0]) for row in found]
        columns = ("method", "perplexity", "KL", "agreement", "choice", "exact match", "tokens/s",
                   "parameters", "folding")  # fmt: skip
        made.append(Table(f"{blocks} of 30 blocks gone", columns, rows))
    about = record["machine"]
    made[-1].notes += [
        f"Model: {record['model']}. Blocks chosen and healed on {SAMPLES} samples of the pages that "
        f"come with deltafold. "
        f"Perplexity, KL and agreement with the whole model: {WINDOWS} windows of {MAX_LENGTH} "
        f"tokens of Python's help. Measured in bf16. Choice among {OPTIONS}: {CHOICES} records to "
        f"read a field from; "
        f"exact match: {ROWS}; {SHOTS} examples before each. After ±: one standard error. Bold: "
        f"least perplexity.",
        f"Machine: {about['cpu']}, one core of {about['cores']}, deltafold {about['deltafold']}. "
        + record.get("remark", ""),
    ]
    beside = programs(record)
    return [*made, beside] if beside else made


def programs(record: Record) -> Table | None:
    """Our rows beside the released programs, where a figure of theirs is known."""
    found = {(row["method"], row["blocks"]): row for row in record["rows"]
             if row["healing"] is None and "unmet" not in row}  # fmt: skip
    rows = []
    for (method, blocks), theirs in sorted(PROGRAMS.items()):
        if (method, blocks) in found:
            ours = found[method, blocks]["perplexity"]
            rows.append((method, str(blocks), number_text(ours["value"], ours["stderr"]),
                         number_text(theirs)))  # fmt: skip
    if not rows:
        return None
    note = (
        "The programs' arithmetic was run apart from these tables, on Python's help too; the whole "
        "model has 16 to 17 on either."
    )
    columns = ("method", "blocks gone", "perplexity, ours", "its released program")
    return Table("Beside the released programs", columns, rows, notes=[note])


def name_of(row: Record) -> str:
    words = {None: "", "through": ", healed", "trained": f", trained {STEPS} steps"}
    return row["method"] + words[row["healing"]]


def line(name: str, row: Record, best: bool = False) -> list[Cell]:
    cells = [
        name,
        number_text(row["perplexity"]["value"], row["perplexity"]["stderr"]),
        kl_text(row["kl"]["value"], row["kl"]["stderr"]) if "kl" in row else MISSING,
        percent_text(row["agreement"]["value"]) if "agreement" in row else MISSING,
        percent_text(row["choice"]["value"], row["choice"]["stderr"]),
        percent_text(row["exact_match"]["value"], row["exact_match"]["stderr"]),
        number_text(row["tokens_per_second"]),
        f"{row['parameters'] / 1e6:.1f} M",
        seconds_text(row["fold_seconds"]) if "fold_seconds" in row else MISSING,
    ]
    return [Strong(each) if best and n < 2 else each for n, each in enumerate(cells)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--healings", nargs="+", help="only these: none, through, trained")
    parser.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS))
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--record", type=Path, default=HERE / "records" / "folding-smollm2.json")
    parser.add_argument(
        "--again", nargs="+", default=[], help="forget rows of these methods, also of former names"
    )
    parser.add_argument("--join", nargs="+", type=Path, help="take in rows of these records")
    parser.add_argument("--into", type=Path, help="Markdown file: write tables, measure nothing")
    options = parser.parse_args()
    if options.into:
        record = json.loads(options.record.read_text(encoding="utf-8"))
        record["rows"] = [row for row in record["rows"] if row["blocks"] in options.blocks]
        rewrite_block(options.into, "folding-smollm2", page(tables(record)))
        return 0
    record = {
        "record_version": RECORD_VERSION, "kind": "folding-benchmark", "whole": {}, "rows": [],
        "model": "SmolLM2-135M-Instruct (134.5 M parameters, bf16, tied embeddings)",
    }  # fmt: skip
    if options.record.is_file():
        record = json.loads(options.record.read_text(encoding="utf-8"))
    record["rows"] = [row for row in record["rows"] if row["method"] not in options.again]
    if options.join:
        join(record, options.join, key_of, ("model",))
        record["rows"].sort(key=place_of)
        write_record(record, options.record)
        return 0
    record |= {"machine": machine()}
    model = options.cache / "smollm2-base"
    try:
        with (
            quiet(),
            tempfile.TemporaryDirectory() as name,
            loaded("whole", model, None, DTYPE, "cpu") as whole,
        ):
            run(Bench(model, whole, Path(name)), record, options.record, options)
    except DeltafoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
