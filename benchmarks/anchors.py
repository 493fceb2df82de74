"""What an anchor is worth to another block's MLP, before any training: SmolLM2-135M.

    python benchmarks/anchors.py                                   # minutes; writes the record
    python benchmarks/anchors.py --into docs/commands/share.md     # writes the table from the record

Several things stand in for the MLP of a block, each fitted to text and judged on other text by the
error of the MLP's outputs over their variance (1: no better than their mean):

    features   neurons of the block before it, or random ones, with an output matrix fitted to them
    linear     one matrix in place of the whole MLP, fitted
    rank r     the three matrices as factors alone, as anchor + delta, and as scaled anchor + delta,
               all whitened by their inputs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from smollm2 import default_cache
from torch.nn.functional import silu

from deltafold.calibration import Sampling, gather_samples
from deltafold.composed.form import Linear, Part
from deltafold.folding.methods.healing import Sums
from deltafold.reporting.markdown import page, rewrite_block
from deltafold.reporting.table import Cell, Table
from deltafold.reporting.units import number_text
from deltafold.running.memory import Meter
from deltafold.running.record import RECORD_VERSION, Record, machine, write_record
from deltafold.sharing.start import composed_values
from deltafold.training import pack
from deltafold.training.loading import load_model

RECORD = Path(__file__).parent / "records" / "anchors-smollm2.json"
BLOCKS, RANKS = (7, 15, 23), (26, 222)
TEXT_ROWS, HELD_ROWS, ROW_TOKENS = 40, 8, 256
DAMPING = 1e-3  # of the mean diagonal, in every fit
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def neurons(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(tokens, in) -> (tokens, neurons)"""
    return silu(x @ gate.T) * (x @ up.T)


def fitted(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The matrix (out, in) that makes y (tokens, out) of h (tokens, in), by damped least squares."""
    sums = Sums.empty(h.shape[1], y.shape[1])
    sums.add(h, y)
    return sums.solve(DAMPING).T.float()


def low_rank(
    own: Matrices, anchor: Matrices | None, seconds: Matrices, rank: int, scaled: bool
) -> list[torch.Tensor]:
    """The matrices as factors, or as those of an anchor plus factors, multiplied out."""
    made = []
    for number, weight in enumerate(own):
        base = torch.zeros_like(weight) if anchor is None else anchor[number]
        path, (rows, columns) = f"matrix {number}", weight.shape
        layer = Linear(shape=(rows, columns), scale=scaled, parts=(Part(rows=rows, rank=rank),))
        found = composed_values(path, layer, weight, base, seconds[number], "activation", 0)
        product = found[f"{path}.delta.0.b"] @ found[f"{path}.delta.0.a"]
        scale = found.get(f"{path}.scale", torch.ones(rows))
        made.append(scale[:, None] * base + product)
    return made


def measure(block: int, own: Matrices, anchor: Matrices, x: torch.Tensor, held: int) -> Record:
    """Errors of all stand-ins for one block. `x` are inputs of its MLP, the last `held` to judge by."""
    gate, up, down = own
    h = neurons(x, gate, up)
    y = h @ down.T
    seconds = (x[:-held].T @ x[:-held], x[:-held].T @ x[:-held], h[:-held].T @ h[:-held])
    seconds = tuple(each / (len(x) - held) for each in seconds)  # type: ignore[assignment]
    spread = (y[-held:] - y[:-held].mean(0)).square().sum()

    def error(made: torch.Tensor) -> float:
        return float((made[-held:] - y[-held:]).square().sum() / spread)

    def on_features(features: torch.Tensor) -> float:
        return error(features @ fitted(features[:-held], y[:-held]).T)

    generator = torch.Generator().manual_seed(block)
    drawn = [torch.randn(each.shape, generator=generator) * each.std() for each in anchor[:2]]
    found: Record = {
        "block": block,
        "anchor_as_it_is": error(neurons(x, *anchor[:2]) @ anchor[2].T),
        "anchor_features": on_features(neurons(x, *anchor[:2])),
        "random_features": on_features(neurons(x, *drawn)),
        "linear": on_features(x),
        "ranks": [],
    }
    for rank in RANKS:
        ways = {"alone": (None, False), "anchor": (anchor, False), "scaled": (anchor, True)}
        row: Record = {"rank": rank}
        for name, (base, scaled) in ways.items():
            gate, up, down = low_rank(own, base, seconds, rank, scaled)
            row[name] = error(neurons(x, gate, up) @ down.T)
        found["ranks"].append(row)
    return found


@torch.no_grad()
def run(cache: Path) -> None:
    """Measure and write the record."""
    folder = cache / "smollm2-base"
    with Meter() as meter:
        model = load_model(folder, torch.bfloat16, torch.device("cpu"))
        samples = gather_samples(folder, Sampling("pages", 1_000_000, ROW_TOKENS))
        ids = pack(samples, ROW_TOKENS).ids
        ids = ids[:: len(ids) // (TEXT_ROWS + HELD_ROWS)][: TEXT_ROWS + HELD_ROWS]
        layers, seen = model.model.layers, {block: [] for block in BLOCKS}  # type: ignore[var-annotated]
        for block, kept in seen.items():
            layers[block].mlp.register_forward_pre_hook(
                lambda mlp, args, kept=kept: kept.append(args[0].flatten(0, 1).float())
            )
        for row in ids.split(4):
            model.model(row, use_cache=False)
        rows = []
        for block, kept in seen.items():
            own, anchor = (
                tuple(
                    getattr(layers[n].mlp, f"{name}_proj").weight.float()
                    for name in ("gate", "up", "down")
                )
                for n in (block, block - 1)
            )
            held = HELD_ROWS * ROW_TOKENS
            rows.append(measure(block, own, anchor, torch.cat(kept), held))
            print(json.dumps(rows[-1]), flush=True)
    record: Record = {
        "record_version": RECORD_VERSION, "kind": "anchors", "model": "SmolLM2-135M-Instruct",
        "tokens": TEXT_ROWS * ROW_TOKENS, "held_tokens": HELD_ROWS * ROW_TOKENS, "rows": rows,
        "seconds": meter.seconds, "machine": machine(),
    }  # fmt: skip
    write_record(record, RECORD)


def table(record: Record) -> Table:
    """One line a stand-in, one column a block."""
    rows: list[list[Cell]] = []
    for words, key in (
        ("anchor's MLP as it is", "anchor_as_it_is"),
        ("anchor's neurons, output fitted", "anchor_features"),
        ("random neurons, output fitted", "random_features"),
        ("one matrix for the MLP, fitted", "linear"),
    ):
        rows.append([words, *(number_text(row[key]) for row in record["rows"])])
    for number, rank in enumerate(RANKS):
        for words, key in (
            ("factors alone", "alone"),
            ("anchor + delta", "anchor"),
            ("scaled anchor + delta", "scaled"),
        ):
            cells = (number_text(row["ranks"][number][key]) for row in record["rows"])
            rows.append([f"{words}, rank {rank}", *cells])
    columns = ("in place of the MLP", *(f"block {row['block']}" for row in record["rows"]))
    note = (
        f"Error of the MLP's outputs over their variance, on {record['held_tokens']:,} tokens that "
        f"nothing was fitted to; fitted to {record['tokens']:,}. {record['model']}; the anchor of a "
        "block is the one before it."
    )
    return Table("What an anchor is worth before training", columns, rows, notes=[note])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--into", type=Path, help="Markdown file: write the table, measure nothing")
    options = parser.parse_args()
    if options.into:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        rewrite_block(options.into, "anchors-smollm2", page([table(record)]))
    else:
        run(options.cache)


if __name__ == "__main__":
    main()
