"""Tables of a factored model: totals, roles, blocks, the search, and what it costs."""

from __future__ import annotations

from deltafold.reporting.records.factor import FactorRecord, FactorRole
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.tables.fold import quality_tables, score_tables
from deltafold.reporting.units import MISSING, bytes_text, kl_text, number_text, percent_text
from deltafold.reporting.wording import run_note


def factor_tables(record: FactorRecord) -> list[Table]:
    """Totals; figures on text and tasks; by role; by block; splits that were tried."""
    return [
        _totals(record),
        *quality_tables(record.quality),
        *score_tables(record.scores),
        _roles(record),
        _blocks(record),
        *_trials(record),
    ]


def _totals(record: FactorRecord) -> Table:
    counted = record.parameters
    rows = [
        ("method", record.method.name),
        ("parameters", f"{counted.kept:,} of {counted.total:,}"),
        ("share of parameters", percent_text(counted.parameter_share)),
        ("share of those in factored layers", percent_text(counted.factorable_share)),
        ("share of ranks", percent_text(counted.rank_share)),
    ]
    if counted.bytes is not None:
        rows.append(("bytes of tensors", f"{counted.bytes:,} ({bytes_text(counted.bytes)})"))
    return Table(f"factor {record.title}", ("", ""), rows, notes=[run_note(record)], left=2)


def _roles(record: FactorRecord) -> Table:
    columns = ("role", "layers", "rank", "share of rank", "parameters", "kept",
               "share of parameters", "error")  # fmt: skip
    rows = [
        (
            role.role,
            str(role.layers),
            _ranks(role),
            percent_text(role.rank_share),
            f"{role.parameters:,}",
            f"{role.kept:,}",
            percent_text(role.parameter_share),
            percent_text(role.relative_error),
        )
        for role in record.roles
    ]
    note = (
        f"Error: squared norm of what the {record.error_of} lose, relative to their own, mean over "
        "layers that have factors."
    )
    return Table("by role", columns, rows, notes=[note])


def _ranks(role: FactorRole) -> str:
    if role.rank is None:
        return "dense"
    low, high = role.rank
    return str(low) if low == high else f"{low} to {high}"


def _blocks(record: FactorRecord) -> Table:
    """Rank of each role by block; what shares a basis stands in each of its blocks."""
    roles = list(dict.fromkeys(unit.role for unit in record.units))
    found: dict[int, dict[str, set[str]]] = {}
    for unit in record.units:
        rank = "dense" if unit.rank is None else str(unit.rank)
        for block in unit.blocks:
            found.setdefault(block, {}).setdefault(unit.role, set()).add(rank)
    rows = [
        [str(block), *(", ".join(sorted(found[block].get(role, {MISSING}))) for role in roles)]
        for block in sorted(found)
    ]
    return Table("ranks by block", ("block", *roles), rows)


def _trials(record: FactorRecord) -> list[Table]:
    trials = record.search.trials
    if not trials:
        return []
    groups = list(trials[0].shares)
    rows: list[list[Cell]] = []
    for number, trial in enumerate(trials):
        cells = [
            str(number),
            *(percent_text(trial.shares[group]) for group in groups),
            number_text(trial.perplexity, None),
            kl_text(trial.kl, None),
        ]
        chosen = number == record.search.chosen
        rows.append([Strong(cell) if chosen else cell for cell in cells])
    note = "Shares of parameters that each group keeps. Bold: the split that was taken."
    return [Table("splits tried", ("trial", *groups, "perplexity", "KL"), rows, notes=[note])]
