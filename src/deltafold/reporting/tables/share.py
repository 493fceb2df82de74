"""Tables of a shared model: what is shared with what, the exact count, and what it costs."""

from __future__ import annotations

from deltafold.reporting.records.evaluate import Metric
from deltafold.reporting.records.fold import FoldScore
from deltafold.reporting.records.share import ShareRecord
from deltafold.reporting.table import Cell, Table
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    kl_text,
    lowered_text,
    number_text,
    percent_text,
)
from deltafold.reporting.wording import run_note


def share_tables(record: ShareRecord) -> list[Table]:
    """Totals; blocks; figures on text before and after; tasks; what was searched."""
    return [
        _totals(record), _places(record), *_quality(record), *_scores(record), *_search(record)
    ]  # fmt: skip


def _totals(record: ShareRecord) -> Table:
    share = record.parameters / record.base_parameters
    rows = [
        ("method", f"{record.method.name}, {record.method.placement}, {record.method.matrices}"),
        ("blocks that share", f"{len(record.places)} of {record.blocks}"),
        ("parameters before", f"{record.base_parameters:,}"),
        ("parameters", f"{record.parameters:,} ({percent_text(share)})"),
        ("of these in deltas", f"{record.delta_parameters:,}"),
        (
            "weights before",
            f"{record.base_weight_bytes:,} B ({bytes_text(record.base_weight_bytes)})",
        ),
        ("weights", f"{record.weight_bytes:,} B ({bytes_text(record.weight_bytes)})"),
    ]
    if record.steps_done is not None:
        rows += [
            ("steps of training", f"{record.steps_done}, best at {record.best_step}"
             f"{lowered_text(record.rate_scale)}"),
            ("trained on", f"{record.text.get('source', MISSING)}, "
             f"{record.text.get('tokens', 0):,} tokens"),
            ("tokens/s in training", number_text(record.tokens_per_second_training)),
        ]  # fmt: skip
    return Table(f"share {record.title}", ("", ""), rows, notes=[run_note(record)], left=2)


def _places(record: ShareRecord) -> Table:
    rows = [
        (
            str(place.block),
            "nothing" if place.anchor is None else f"block {place.anchor}",
            str(place.rank or "none"),
            str(place.write_rank or "none"),
        )
        for place in record.places
    ]
    return Table("blocks", ("block", "refers to", "rank", "rank of outputs"), rows, left=2)


def _quality(record: ShareRecord) -> list[Table]:
    if not record.quality:
        return []
    rows = [
        (stage, number_text(found.perplexity, None), kl_text(found.kl, None))
        for stage, found in record.quality.items()
    ]
    return [Table("on held-out text", ("stage", "perplexity", "KL"), rows, left=1)]


def _scores(record: ShareRecord) -> list[Table]:
    """Before and after: text, tasks, KL and agreement on them, speed, size."""
    if not record.scores:
        return []
    tasks = list(record.scores[0].metrics.tasks)
    rows: list[list[Cell]] = [_score(model, tasks) for model in record.scores]
    columns = ("model", "perplexity", "KL", "agreement", *tasks, "tokens/s", "weights")
    note = "Tasks: exact match or accuracy. After ±: one standard error. Speed: one row, greedy."
    return [Table("before and after", columns, rows, notes=[note])]


def _score(model: FoldScore, tasks: list[str]) -> list[Cell]:
    metrics = model.metrics
    perplexity = metrics.perplexity or Metric()
    kl, agreement = metrics.kl_text or Metric(), metrics.agreement_text or Metric()
    cells: list[Cell] = [
        model.label,
        number_text(perplexity.value, perplexity.stderr),
        kl_text(kl.value, kl.stderr),
        percent_text(agreement.value, agreement.stderr),
    ]
    for name in tasks:
        found = metrics.tasks[name]
        metric = found.get("exact_match") or found.get("accuracy") or Metric()
        cells.append(percent_text(metric.value, metric.stderr))
    return [*cells, number_text(model.tokens_per_second), bytes_text(model.weight_bytes)]


def _search(record: ShareRecord) -> list[Table]:
    if not record.search:
        return []
    keys = ("rate", "kl_share", "temperature", "replace_from", "replace_until", "replace_stagger",
            "split")  # fmt: skip
    found = sorted(record.search, key=lambda row: float(row["kl"]))
    rows = [
        (kl_text(row["kl"], None), *(number_text(row.get(key)) for key in keys)) for row in found
    ]
    columns = ("KL", "rate", "KL share", "temperature", "from", "until", "stagger", "split")
    return [Table("settings tried, the best first", columns, rows, left=0)]
