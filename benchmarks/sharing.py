"""DeltaLLM against its controls and against folding, at equal stored parameters, trained alike.

    python benchmarks/sharing.py demo                   # minutes; goes on where it stopped
    python benchmarks/sharing.py smollm2                # an hour on one core that is free
    python benchmarks/sharing.py smollm2-long --device cuda     # a hundred times the text
    python benchmarks/sharing.py demo --into docs/commands/share.md
    python benchmarks/sharing.py demo --join a.json b.json      # records of parts become one

Every model is measured before and after the same number of steps on the same text, towards the whole
model (KL alone, at temperature 1). What it is measured on is other text. `delta` trains the low-rank
factors alone, as DeltaLLM does; `all` trains every weight, as the folded models are healed. A folded
model has the number of blocks whose parameters are nearest to the share asked for. Of jointdrop as
many sub-layers are silent as it takes, and these are not counted. SmolLM2 runs, and is measured, in
bf16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pydoc_data.topics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from joining import join
from smollm2 import default_cache

import deltafold
from deltafold.calibration import Sampling, gather_samples
from deltafold.errors import DeltafoldError
from deltafold.reporting.markdown import page, rewrite_block
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import MISSING, kl_text, number_text, percent_text
from deltafold.running.devices import computing, here
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record
from deltafold.training import Masters, Rows, Settings, exam, forward_tokens, pack, train
from deltafold.training.loading import load_model

HERE = Path(__file__).parent
PEERS = ("shortgpt", "laco", "jointdrop")
SHARES = (0.88, 0.76)
HOW: dict[str, Any] = {"start": "activation", "replace_until": 0.0}
# label -> method and settings, beside HOW
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "deltallm": ("deltallm", {}),
    "no-anchor": ("no-anchor", {}),
    "drop-mlp": ("drop-mlp", {}),
    "tie": ("tie", {}),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deltallm, not scaled": ("deltallm", {"scale": False}),
    "deltallm, aligned": ("deltallm", {"align": True}),
    "deltallm, fitted": ("deltallm", {"start": "fit"}),
    "no-anchor, fitted": ("no-anchor", {"start": "fit"}),
    "deltallm, fitted, low rate": ("deltallm", {"start": "fit", "rate": 1e-4}),
    "no-anchor, fitted, low rate": ("no-anchor", {"start": "fit", "rate": 1e-4}),
    "deltallm, replaced by and by": ("deltallm", {"replace_until": 0.5}),
    "deltallm, not scaled, svd": ("deltallm", {"scale": False, "start": "svd"}),
    "deltallm, not scaled, zero": ("deltallm", {"scale": False, "start": "zero"}),
}
DEMO_CHARACTERS = 8000  # of its held-out text
TOPIC_CHARACTERS = 1500  # of each topic; a measurement is made for each of many models
DELTA_RATE = 2e-3
TEXTS = {"self": "text that the whole model wrote", "pages": "the pages that come with deltafold"}
LONG_STEPS, LONG_SAMPLES = 200, 8192  # a step has 64 rows of 256 tokens
FOLD_SAMPLES = 128  # of text that tells which blocks are alike
TOPICS = ("types", "strings", "specialnames", "execmodel", "import", "with", "async", "class")


@dataclass(frozen=True)
class Subject:
    """A model, and how it is trained and measured."""

    name: str
    title: str
    folder: Path
    protect: tuple[int, ...]
    text: str
    row_tokens: int
    steps: int
    batch: int
    bf16: bool
    samples: int | None  # of text that the model writes itself
    rate: float  # of all weights

    def rate_of(self, tune: str) -> float:
        """The highest learning rate."""
        return DELTA_RATE if tune == "delta" else self.rate


def subject_of(name: str, cache: Path) -> Subject:
    if name == "demo":
        folder = HERE.parent / "demo" / "models" / "base"
        title = "the demo's base (3.2 M parameters, 4 blocks)"
        return Subject(name, title, folder, (), "self", 64, 60, 8, False, 512, 3e-4)
    title = "SmolLM2-135M-Instruct (134.5 M parameters, 30 blocks)"
    model = (name, title, cache / "smollm2-base", (0, 1, -2, -1))
    if name == "smollm2":
        return Subject(*model, "pages", 128, 32, 8, True, None, 3e-4)
    return Subject(*model, "self", 256, LONG_STEPS, 64, True, LONG_SAMPLES, 6e-4)


def measured_text(subject: Subject, folder: Path) -> Path:
    """Text that no training saw."""
    if subject.name == "demo":
        text = (HERE.parent / "demo" / "tasks" / "text.txt").read_text(encoding="utf-8")
        (folder / "text.txt").write_text(text[:DEMO_CHARACTERS], encoding="utf-8")
        return folder / "text.txt"
    path = folder / "help.txt"
    found = pydoc_data.topics.topics
    pieces = [found[name][:TOPIC_CHARACTERS] for name in TOPICS if name in found]
    path.write_text("\n\n".join(pieces), encoding="utf-8")
    return path


class Bench:
    """One model's text, and the cells that are measured on it."""

    def __init__(self, subject: Subject, folder: Path, options: argparse.Namespace):
        self.subject, self.options = subject, options
        self.steps = options.steps or subject.steps
        self.text = measured_text(subject, folder)
        self.judged = self.rows(self.text)
        self.dtype = torch.bfloat16 if subject.bf16 else torch.float32

    def rows(self, source: str | Path) -> Rows:
        samples = self.subject.samples if source == "self" else None
        found = gather_samples(
            self.subject.folder,
            Sampling(source, samples or 1_000_000, self.subject.row_tokens),
        )  # fmt: skip
        return pack(found, self.subject.row_tokens)

    def load(self, folder: Path) -> Any:
        return load_model(folder, self.dtype, here())

    def shared(self, share: float, label: str, tune: str) -> Record:
        """One `share` run."""
        subject = self.subject
        method, settings = (SHARED | VARIANTS)[label]
        with tempfile.TemporaryDirectory() as name:
            made = deltafold.share(
                subject.folder, Path(name) / "shared", method, parameters=share,
                protect=subject.protect, calibration=subject.text, steps=self.steps,
                samples=subject.samples, max_tokens=subject.row_tokens, batch=subject.batch,
                tune=tune, text=self.text, kl_share=1.0, temperature=1.0, bf16=subject.bf16,
                check_steps=max(1, self.steps // 2),
                **({"rate": subject.rate_of(tune)} | HOW | settings),
            )  # fmt: skip
        keep = ("parameters", "quality", "seconds", "peak_memory_bytes", "best_step", "curve",
                "tokens_per_second_training", "weight_bytes", "exams")  # fmt: skip
        return {key: made[key] for key in keep}

    def folded(self, share: float, method: str) -> Record:
        """One fold, healed by the same loop on the same text, every weight of it."""
        subject = self.subject
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "folded"
            text = {"calibration": subject.text, "samples": FOLD_SAMPLES,
                    "max_tokens": subject.row_tokens}  # fmt: skip
            plan = deltafold.fold(subject.folder, folder, method, blocks=1, dry_run=True)
            one = plan["block_parameters"] / plan["parameters"]
            # Blocks and sub-layers are large: what comes near to the share, not what goes beyond.
            much: dict[str, Any] = {"blocks": max(1, round((1 - share) / one))}
            if method == "jointdrop":  # sub-layers go until the share is reached
                much = {"parameters": min(0.999, share + one / 2)}
            made = deltafold.fold(subject.folder, folder, method, **much, **text)
            student = Plain(self.load(folder), trained=True)
        whole = self.load(subject.folder)
        gone = made["removed"]["parameters"] + round(
            made["silenced_parameter_share"] * made["parameters"]
        )
        found: Record = {
            "parameters": made["parameters"] - gone,
            "quality": {"start": self.figures(student, whole)},
        }
        learn, held = self.rows(subject.text).split(0)
        state = train(student, Plain(whole).logits, learn, held, self.settings(student.model))
        found["quality"]["trained"] = self.figures(student, whole)
        return found | {
            "best_step": state.best_step,
            "tokens_per_second_training": state.tokens_per_second,
            "exams": [{"step": int(s), "ce": ce, "kl": kl} for s, ce, kl in state.exams],
        }

    def settings(self, model: Any) -> Settings:
        return Settings(
            self.steps, self.subject.rate, self.subject.batch, kl_share=1.0, temperature=1.0,
            check_steps=max(1, self.steps // 2), forward_tokens=forward_tokens(model, here()),
        )  # fmt: skip

    def figures(self, student: Plain, whole: Any) -> Record:
        """Perplexity and KL on the measured text."""
        ce, kl = exam(student.logits, Plain(whole).logits, self.judged, here())
        return {"perplexity": math.exp(ce), "kl": kl}

    def whole(self) -> Record:
        """Perplexity of the whole model."""
        plain = Plain(self.load(self.subject.folder))
        ce, _ = exam(plain.logits, None, self.judged, here())
        return {
            "perplexity": math.exp(ce),
            "parameters": sum(p.numel() for p in plain.model.parameters()),
        }


class Plain:
    """An ordinary model as a student: every weight is trained."""

    def __init__(self, model: Any, trained: bool = False):
        self.model = model
        # A sub-layer that was dropped stays so.
        self.masters = Masters(
            (name, each) for name, each in model.named_parameters() if trained and each.any()
        )
        self.parameters = self.masters.parameters

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def begin_step(self, step: int) -> None:
        """Nothing is drawn."""
        self.masters.round()

    def begin_exam(self) -> None:
        """It is always as it will be."""
        self.masters.round()


def run(bench: Bench, record: Record, out: Path, options: argparse.Namespace) -> None:
    """Measure what the record lacks; it is written after each cell."""
    record["whole"] = record["whole"] or bench.whole()
    labels = options.methods or [*SHARED, *PEERS]
    ways = [(label, tune) for label in labels for tune in ("all", "delta")]
    if bench.subject.name == "demo" and not options.methods:
        ways += [(label, tune) for label in VARIANTS for tune in ("all", "delta")]
    for share, (label, tune) in itertools.product(options.shares, ways):
        key = {"share": share, "method": label, "tune": tune, "steps": bench.steps}
        if tune not in options.tune:
            continue
        if any(key_of(row) == key_of(key) for row in record["rows"]):
            continue
        if label in PEERS and tune == "delta":
            continue
        try:
            made = (
                bench.folded(share, label) if label in PEERS else bench.shared(share, label, tune)
            )
        except DeltafoldError as error:
            made = {"unmet": str(error)}
        record["rows"].append(key | made)
        write_record(record, out)
        shown = {k: v for k, v in record["rows"][-1].items() if k not in ("curve", "exams")}
        print(json.dumps(shown), flush=True)


def key_of(row: Record) -> tuple[Any, ...]:
    """What tells one row from another."""
    return row["share"], row["method"], row["tune"], row["steps"]


# --- the tables -------------------------------------------------------------------------------


def tables(record: Record) -> list[Table]:
    """One a share of parameters, least KL after training first."""
    made = []
    for share in sorted({row["share"] for row in record["rows"]}, reverse=True):
        found = [row for row in record["rows"] if row["share"] == share and "unmet" not in row]
        found.sort(key=lambda row: row["quality"]["trained"]["kl"])
        whole = record["whole"]
        first: list[Cell] = ["whole model", MISSING, f"{whole['parameters'] / 1e6:.2f} M",
                             MISSING, number_text(whole["perplexity"]), MISSING, MISSING]  # fmt: skip
        rows = [first, *(line(row, best=row is found[0], whole=whole) for row in found)]
        columns = ("method", "trained", "parameters", "perplexity before", "perplexity after",
                   "KL before", "KL after")  # fmt: skip
        made.append(Table(f"{percent_text(share)} of parameters", columns, rows, left=2))
    if made:
        about, steps = record["machine"], sorted({row["steps"] for row in record["rows"]})
        made[-1].notes += [
            f"Model: {record['model']}. {', '.join(map(str, steps))} steps of {record['batch']} rows "
            f"of {record['row_tokens']} tokens of {record['text']}, for every row of the table; before "
            "and after them. Trained: all weights, or deltas alone. KL from the whole model, nats a "
            "token. Bold: least KL after.",
            f"Machine: {'' if about['device'] == 'cpu' else about['device'] + '; '}{about['cpu']}, "
            f"{about['cores']} cores, deltafold {about['deltafold']}.",
        ]
    return made


def line(row: Record, best: bool, whole: Record) -> list[Cell]:
    quality, name = row["quality"], row["method"]
    share = row["parameters"] / whole["parameters"]
    cells: list[Cell] = [
        f"{name} (fold)" if name in PEERS else name,
        row["tune"],
        f"{row['parameters'] / 1e6:.2f} M ({percent_text(share)})",
        number_text(quality["start"]["perplexity"]),
        number_text(quality["trained"]["perplexity"]),
        kl_text(quality["start"]["kl"], None),
        kl_text(quality["trained"]["kl"], None),
    ]
    return [Strong(each) if best and n in (0, 6) else each for n, each in enumerate(cells)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=("demo", "smollm2", "smollm2-long"))
    parser.add_argument("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:N")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--methods", nargs="+", help="Only these")
    parser.add_argument("--tune", nargs="+", default=["all", "delta"], help="Only these")
    parser.add_argument("--steps", type=int, help="Of every training")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--record", type=Path)
    parser.add_argument("--join", nargs="+", type=Path, help="Take in rows of these records")
    parser.add_argument("--into", type=Path, help="Markdown file: write tables, measure nothing")
    options = parser.parse_args()
    subject = subject_of(options.model, options.cache)
    out = options.record or HERE / "records" / f"sharing-{subject.name}.json"
    if options.into:
        record = json.loads(out.read_text(encoding="utf-8"))
        rewrite_block(options.into, f"sharing-{subject.name}", page(tables(record)))
        return 0
    record = {
        "record_version": RECORD_VERSION, "kind": "sharing-benchmark", "model": subject.title,
        "batch": subject.batch, "row_tokens": subject.row_tokens, "whole": {}, "rows": [],
    }  # fmt: skip
    if out.is_file():
        record = json.loads(out.read_text(encoding="utf-8"))
    try:
        if options.join:
            join(record, options.join, key_of, ("model", "batch", "row_tokens"))
            write_record(record, out)
            return 0
        with computing(options.device), tempfile.TemporaryDirectory() as name:
            record |= {"machine": machine(), "text": TEXTS[subject.text]}
            run(Bench(subject, Path(name), options), record, out, options)
    except DeltafoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
