"""How near to the fine-tune at which size: every lossy method x file ratio x fine-tune x seed.

    python benchmarks/frontier.py smollm2                       # goes on where it stopped
    python benchmarks/frontier.py demo --methods dare --ratios 16 32
    python benchmarks/frontier.py smollm2 --into docs/frontier.md  # the tables, from the record
    python benchmarks/frontier.py smollm2 --join a.json b.json  # records of parts become one

The first seed of a cell is compressed, and once for each method and ratio restored, by the command
line in a process of its own: seconds and memory as a user has them. Other seeds are compressed here.
One model stays in memory and takes the weights of one archive after another (see `answers.py`).
The record, `benchmarks/records/frontier-FAMILY.json`, is written after every cell.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import cells
import torch
from answers import BATCH_ROWS, Resident, columns, resident
from cells import Cell
from families import Family, FineTune, family
from ledger import Ledger, named

from deltafold.codecs import get
from deltafold.errors import BudgetError, DeltafoldError, NonFiniteError, UsageError
from deltafold.evaluation.loading import loaded
from deltafold.reporting.markdown import page, rewrite_block
from deltafold.reporting.records import FrontierRecord, read_records
from deltafold.reporting.tables.frontier import PARTS, frontier_tables
from deltafold.restoring.load import load_state
from deltafold.running.record import Record

HERE = Path(__file__).parent
RATIOS = (8, 16, 32, 64, 128, 256)
SEEDS = 3  # of methods that draw at random


def cells_of(
    methods: Iterable[str], ratios: Iterable[int], seeds: int, calibration: Path | None
) -> Iterator[Cell]:
    """All cells of one fine-tune. One seed is enough where nothing is drawn at random."""
    for method in methods:
        codec = get(method)
        text = calibration if getattr(codec, "uses_moments", False) else None
        for ratio in ratios:
            for seed in range(seeds if getattr(codec, "seeded", False) else 1):
                yield Cell(method, ratio, seed, text)


def calibration_of(given: str, finetune: FineTune) -> Path | None:
    """The calibration text that `--calibration` means for this fine-tune. Raises UsageError."""
    if given == "none":
        return None
    path = finetune.calibration if given == "task" else Path(given)
    if not path.is_file():
        raise UsageError(f"There is no calibration text {path}; give --calibration FILE or none.")
    return path


def make(cell: Cell, base: Path, finetuned: Path, archive: Path, timed: bool) -> Record:
    """The archive of a cell, and what a row says of it. Raises BudgetError."""
    if not timed:
        return cells.compress_here(cell, base, finetuned, archive)
    try:
        return cells.compress(cell, base, finetuned, archive, quiet=True)
    except cells.CommandFailedError:
        cells.compress_here(cell, base, finetuned, archive)  # says what kind of error it is
        raise


def measure(
    cell: Cell,
    base: Path,
    finetune: FineTune,
    model: Resident,
    timed: bool,
    restored: bool,
    scratch: Path,
) -> Record:
    """One row. A size that the method cannot meet is told in `unmet`."""
    row = named(cell, finetune.name)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        archive = Path(name) / f"{cell.name}.delta"
        try:
            row |= make(cell, base, finetune.folder, archive, timed)
            start = time.perf_counter()
            row |= columns(model.figures(load_state(archive, base), cell.name))
            row["score_seconds"] = time.perf_counter() - start
            if restored:
                row |= cells.restore(archive, base, Path(name) / "restored", quiet=True)
        except (BudgetError, NonFiniteError) as error:
            row["unmet"] = str(error)
    return row


def run(ledger: Ledger, these: Family, names: list[str], options: argparse.Namespace) -> None:
    """Measure every cell that the record lacks."""
    for name in names:
        finetune = these.finetunes[name]
        ledger.check_finetune(name, finetune.relative_delta_norm)
        text = calibration_of(options.calibration, finetune)
        wanted = cells_of(options.methods, options.ratios, options.seeds, text)
        missing = [cell for cell in wanted if ledger.lacks(cell, name)]
        if not missing:
            continue
        with resident(finetune.folder, finetune.task, options.rows) as model:
            if name not in ledger.record["reference"]:
                ledger.record["reference"][name] = references(these.base, model)
                ledger.record["data"][name] = finetune.data(options.rows)
                ledger.record["relative_delta_norm"][name] = finetune.relative_delta_norm
            for cell in missing:
                if not ledger.lacks(cell, name):  # seed 0 has just shown that it cannot be met
                    continue
                timed = cell.seed == 0 and not options.untimed
                restored = timed and not ledger.has_restored(cell)
                start = time.perf_counter()
                row = measure(cell, these.base, finetune, model, timed, restored, options.scratch)
                row["cell_seconds"] = time.perf_counter() - start
                ledger.add(row)
                print(line_of(row), flush=True)


def references(base: Path, model: Resident) -> Record:
    """What base and fine-tune themselves score."""
    with loaded("base", base, None, torch.float32, "cpu") as subject:
        of_base = model.answers.figures(subject)
    return {"base": columns(of_base), "fine-tune": columns(model.answers.teacher_figures)}


def line_of(row: Record) -> str:
    """A row for the terminal."""
    cell = f"{row['finetune']} {row['method']} {row['asked_file_ratio']:g}x seed {row['seed']}"
    if row.get("unmet"):
        return f"{cell}: {row['unmet']}"
    return (
        f"{cell}: {row['archive_bytes']:,} bytes, KL {row['kl']:.6f}, exact match "
        f"{row['exact_match']:.3f}, {row['cell_seconds']:.1f} s"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    lossy = cells.methods(lossy=True)
    parser.add_argument("family", choices=("demo", "smollm2"))
    parser.add_argument("--methods", nargs="+", default=lossy, choices=lossy, metavar="METHOD")
    parser.add_argument("--ratios", nargs="+", type=int, default=list(RATIOS))
    parser.add_argument("--finetunes", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of methods that draw at random")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows to score")
    parser.add_argument(
        "--calibration",
        default="none",
        metavar="FILE",
        help="text for methods that use the layers' inputs; `task`: the task's own; `none`",
    )
    parser.add_argument("--fresh", action="store_true", help="measure these cells again")
    parser.add_argument("--cache", type=Path, help="folder of the SmolLM2 pairs and of texts")
    parser.add_argument("--scratch", type=Path, help="folder for archives, while they are needed")
    parser.add_argument("--record", type=Path, help="default: records/frontier-FAMILY.json")
    parser.add_argument("--untimed", action="store_true",
                        help="compress in this process: quicker, no seconds, no peak of memory")  # fmt: skip
    parser.add_argument("--join", nargs="+", type=Path, help="take in rows of these records")
    parser.add_argument("--into", type=Path, help="Markdown file: write tables, measure nothing")
    parser.add_argument("--marker", help="where in that file; default: frontier-FAMILY")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=[], metavar="PART",
                        help=f"of the tables: {', '.join(PARTS)} (default: all)")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, or write tables from the record; an exit code."""
    options = parse(arguments)
    out = options.record or HERE / "records" / f"frontier-{options.family}.json"
    try:
        if options.into:
            (record,) = read_records([out])
            assert isinstance(record, FrontierRecord)
            tables = page(frontier_tables(record, options.parts))
            rewrite_block(options.into, options.marker or f"frontier-{options.family}", tables)
            return 0
        these = family(options.family, options.cache)
        names = options.finetunes or list(these.finetunes)
        if unknown := sorted(set(names) - set(these.finetunes)):
            raise UsageError(
                f"The family {these.name} has no fine-tune {unknown[0]!r}; "
                f"there are: {', '.join(these.finetunes)}."
            )
        settings = {"rows": options.rows, "batch_rows": BATCH_ROWS, "dtype": "fp32"}
        ledger = Ledger.open(out, these.title, these.model, settings)
        if options.join:
            ledger.join(options.join)
            return 0
        if options.fresh:
            ledger.forget(names, options.methods, options.ratios)
        ledger.check(settings)
        run(ledger, these, names, options)
    except DeltafoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
