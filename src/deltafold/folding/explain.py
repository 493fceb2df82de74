"""Why blocks were folded: similarity matrices, manifolds and merges, as CSV and JSON in a folder.

similarity-00.csv   the matrix before the first step, row and column by state; -01 before the next
embedding.csv       state, sample, coordinates on MKA's manifold
steps.json          merges in order: kept, gone, ratio, score
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import torch

from deltafold.checkpoint import sealed
from deltafold.errors import UsageError
from deltafold.folding.work import Folded


def check_explain(folder: str | Path | None) -> None:
    """Refuse, before work begins, a place where no files can go."""
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"{folder} is a file; give --explain a folder.")


def write_explanation(folder: Path, folded: Folded, points: torch.Tensor | None) -> None:
    """Write what is known. `points` (s, n, d) are the model's states on MKA's manifold."""
    for number, (blocks, matrix) in enumerate(folded.matrices):
        names = ["input", *(f"block {block}" for block in blocks)]
        rows = [
            [name, *map(_digits, row)] for name, row in zip(names, matrix.tolist(), strict=True)
        ]
        _write(folder / f"similarity-{number:02d}.csv", _csv([["state", *names], *rows]))
    if points is not None:
        rows = [
            [str(state), str(sample), *map(_digits, place)]
            for state, each in enumerate(points.tolist())
            for sample, place in enumerate(each)
        ]
        axes = [f"x{axis + 1}" for axis in range(points.shape[-1])]
        _write(folder / "embedding.csv", _csv([["state", "sample", *axes], *rows]))
    steps = {"steps": folded.steps, "kept": folded.draft.numbers}
    _write(folder / "steps.json", json.dumps(steps, indent=1) + "\n")


def _csv(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _digits(value: float) -> str:
    return f"{value:.6g}"


def _write(path: Path, text: str) -> None:
    sealed.put(path, [text.encode()])
