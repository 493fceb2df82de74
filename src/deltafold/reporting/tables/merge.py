"""Tables of a merge: what each model contributed, how far they agree, what was tried, all scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

from deltafold.names import ROLES
from deltafold.reporting.records.evaluate import EvaluatedModel, Metric
from deltafold.reporting.records.merge import MergedTensor, MergeRecord, Tried
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import MISSING, bytes_text, number_text, percent_text, smaller_text
from deltafold.reporting.wording import run_note

ABOUT_MODELS = (
    "Kept: norm of the delta after the sparsifier / norm of the delta. In the merged: <merged, D> / "
    "<D, D>, 100 % where the delta is there in full."
)
ABOUT_SIGNS = (
    "Agreed: of the entries that several models change, those whose changes have one sign. Cosine: "
    "between the deltas of two models, all tensors taken as one."
)


def merge_tables(record: MergeRecord) -> list[Table]:
    """What models contributed, agreement by role, and what was searched and scored."""
    tables = [_models(record), _by_role(record)]
    if record.search is not None:
        tables.append(_search(record.search.criterion, record.search.tried))
    if record.scores:
        tables.append(_scores(record.scores))
    tables[-1].notes.append(run_note(record))
    return tables


def _models(record: MergeRecord) -> Table:
    rows: list[Sequence[Cell]] = []
    for n, label in enumerate(record.models):
        square = math.fsum(_norms(t)[n] ** 2 for t in record.floats)
        kept = math.fsum(t.kept[n] ** 2 for t in record.floats)
        along = math.fsum(_norms(t)[n] ** 2 * (t.brought[n] or 0.0) for t in record.floats)
        shares = [MISSING, MISSING]
        if square:
            shares = [percent_text(math.sqrt(kept / square)), percent_text(along / square)]
        rows.append((label, number_text(math.sqrt(square)), *shares))
    merged = math.sqrt(math.fsum(t.norm**2 for t in record.floats))
    rows.append([Strong("merged"), Strong(number_text(merged)), "", ""])
    recipe, words = record.recipe, [ABOUT_MODELS]
    title = f"{record.title}: {recipe.get('method')} of {len(record.models)} models"
    if record.archive is not None:
        totals = record.archive
        size = f"{bytes_text(totals.archive_bytes)}, {smaller_text(totals.file_ratio)}"
        words.append(f"Written as an archive: {size}.")
    columns = ("model", "norm of its delta", "kept", "in the merged")
    return Table(title, columns, rows, notes=[*words, *record.notes])


def _norms(tensor: MergedTensor) -> list[float]:
    return tensor.norms or []


def _by_role(record: MergeRecord) -> Table:
    pairs = list(combinations(range(len(record.models)), 2))
    groups = {role: [t for t in record.floats if t.role == role] for role in ROLES}
    rows: list[Sequence[Cell]] = []
    for role, tensors in [*groups.items(), ("all", record.floats)]:
        if not tensors:
            continue
        found = (cosine(tensors, number, pair) for number, pair in enumerate(pairs))
        cells = [role, percent_text(agreed(tensors)), *(number_text(each) for each in found)]
        rows.append([Strong(text) for text in cells] if role == "all" else cells)
    names = [f"{record.short[a]} · {record.short[b]}" for a, b in pairs]
    return Table("Where models agree", ("role", "agreed", *names), rows, notes=[ABOUT_SIGNS])


def agreed(tensors: Iterable[MergedTensor]) -> float | None:
    """Share of entries agreed in sign, of those that several models change; None without any."""
    known = [(t.agreed * t.shared, t.shared) for t in tensors if t.agreed is not None]
    shared = sum(count for _, count in known)
    return math.fsum(part for part, _ in known) / shared if shared else None


def cosine(tensors: Iterable[MergedTensor], number: int, pair: tuple[int, int]) -> float | None:
    """Cosine of two models' deltas, tensors taken as one; `number` is the pair's. None for zeros."""
    along, one, two = 0.0, 0.0, 0.0
    for tensor in tensors:
        a, b = (_norms(tensor)[n] for n in pair)
        along += tensor.cosines[number] * a * b
        one, two = one + a * a, two + b * b
    return along / math.sqrt(one * two) if one and two else None


def mean_cosine(tensors: Sequence[MergedTensor]) -> float | None:
    """Mean over pairs of models of the cosine of their deltas, tensors taken as one."""
    n_models = len(_norms(tensors[0])) if tensors else 0
    pairs = enumerate(combinations(range(n_models), 2))
    known = [c for number, pair in pairs if (c := cosine(tensors, number, pair)) is not None]
    return math.fsum(known) / len(known) if known else None


def _search(criterion: str, tried: Sequence[Tried]) -> Table:
    names = list(tried[0].settings)
    rows: list[Sequence[Cell]] = []
    for each in tried:
        cells = [f"{each.settings[name]:g}" for name in names]
        cells += [percent_text(each.share_right), number_text(each.loss)]
        cells.append("kept" if each.kept else each.failed or "")
        rows.append([Strong(cell) for cell in cells] if each.kept else cells)
    note = f"Chosen by: {criterion}. Loss: nats a token of right answers, or of the text."
    return Table(
        "Tried", (*names, "right", "loss", ""), rows, notes=[note], left=0, keys=len(names)
    )


def _scores(models: Sequence[EvaluatedModel]) -> Table:
    """Models by tasks, and by text."""
    tasks = list(dict.fromkeys(name for model in models for name in model.metrics.tasks))
    text = any(model.metrics.perplexity for model in models)
    rows: list[Sequence[Cell]] = []
    for model in models:
        cells = [model.label]
        for name in tasks:
            found = model.metrics.tasks.get(name, {})
            metric = found.get("exact_match") or found.get("accuracy") or Metric()
            cells.append(percent_text(metric.value, metric.stderr))
        if text:
            metric = model.metrics.perplexity or Metric()
            cells.append(number_text(metric.value, metric.stderr))
        rows.append([Strong(cell) for cell in cells] if model.role == "merged" else cells)
    columns = ("model", *tasks, *["perplexity"] * text)
    note = "Tasks: exact match or accuracy. After ±: one standard error."
    return Table("On tasks and text", columns, rows, notes=[note])
