"""Tables of a folded model: what went, what it costs, and step by step why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deltafold.reporting.records.evaluate import Metric
from deltafold.reporting.records.fold import FoldRecord, FoldScore, TextQuality
from deltafold.reporting.table import Table
from deltafold.reporting.units import (
    MISSING,
    bytes_text,
    kl_text,
    lowered_text,
    number_text,
    percent_text,
)
from deltafold.reporting.wording import run_note


def fold_tables(record: FoldRecord) -> list[Table]:
    """Totals; figures on text before and after; steps."""
    return [
        _totals(record),
        *quality_tables(record.quality),
        *score_tables(record.scores),
        *_training(record),
        *_steps(record),
    ]


def _totals(record: FoldRecord) -> Table:
    removed = record.removed
    rows = [
        ("method", record.method.name),
        ("blocks gone", f"{len(removed.blocks)} of {record.blocks}: {_list(removed.blocks)}"),
        ("share of layers", percent_text(removed.layer_share)),
        ("share of parameters", percent_text(removed.parameter_share)),
    ]
    if record.silenced:
        parts = ", ".join(f"{part.part} of {part.block}" for part in record.silenced)
        rows.append(("silent, but stored", parts))
    if record.unhealed_because:
        rows.append(("nothing was healed", record.unhealed_because))
    return Table(f"fold {record.title}", ("", ""), rows, notes=[run_note(record)], left=2)


def quality_tables(quality: Mapping[str, TextQuality]) -> list[Table]:
    """Figures on text, stage by stage; no table where nothing was measured."""
    if not quality:
        return []
    rows = [
        (stage, number_text(found.perplexity, None), kl_text(found.kl, None),
         percent_text(found.agreement))
        for stage, found in quality.items()
    ]  # fmt: skip
    return [Table("on held-out text", ("stage", "perplexity", "KL", "agreement"), rows, left=1)]


def score_tables(scores: Sequence[FoldScore]) -> list[Table]:
    """Before and after: tasks, KL on their answers, speed, size."""
    if not scores:
        return []
    tasks = list(scores[0].metrics.tasks)
    rows = []
    for model in scores:
        cells = [model.label]
        for name in tasks:
            found = model.metrics.tasks[name]
            metric = found.get("exact_match") or found.get("accuracy") or Metric()
            cells.append(percent_text(metric.value, metric.stderr))
        cells += [number_text(model.tokens_per_second), bytes_text(model.weight_bytes)]
        rows.append(cells)
    columns = ("model", *tasks, "tokens/s", "weights")
    note = "Tasks: exact match or accuracy. After ±: one standard error. Speed: one row, greedy."
    return [Table("on tasks", columns, rows, notes=[note])]


def _training(record: FoldRecord) -> list[Table]:
    """Looks at held-out rows while what is left was trained."""
    if record.healing is None:
        return []
    rows = [(str(exam.step), kl_text(exam.kl, None)) for exam in record.healing.exams]
    note = (
        f"Trained on {record.healing.training_tokens:,} tokens of the calibration text; the state "
        f"after step {record.healing.best_step} is kept{lowered_text(record.healing.rate_scale)}."
    )
    return [Table("training", ("step", "KL, held out"), rows, notes=[note])]


def _steps(record: FoldRecord) -> list[Table]:
    if not record.steps:
        return []
    rows = [
        (
            _list(step.gone) + (f" ({step.part})" if step.part else ""),
            MISSING if step.kept is None else str(step.kept),
            MISSING if step.ratio is None else f"{step.ratio:.3f}",
            MISSING if step.score is None else f"{step.score:.4g}",
        )
        for step in record.steps
    ]
    return [Table("steps", ("gone", "into", "its share", "score"), rows, left=2)]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
