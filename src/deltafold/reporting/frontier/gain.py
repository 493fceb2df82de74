"""What `auto` gains over the best published recipe: one row a fine-tune, and one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from deltafold.reporting.frontier import (
    COMMON_RATIO,
    KEPT_RATIO,
    RIVALS,
    SUBJECT,
    Advantage,
    advantage,
    finetunes,
    gain_kept,
    grid,
)
from deltafold.reporting.records import FrontierRecord
from deltafold.reporting.table import Cell, Strong, Table
from deltafold.reporting.units import (
    bytes_text,
    norm_text,
    percent_text,
    plain_text,
    ratio_text,
    ratio_words,
)

_BEFORE_BYTES = {"": "", "more than": "below ", "less than": "above "}


def gain_tables(record: FrontierRecord) -> list[Table]:
    """One table: at the best rival's KL, how many times smaller is `auto`; what it keeps."""
    rows: list[list[Cell]] = []
    gains: list[Advantage] = []
    kept: list[float] = []
    for finetune in finetunes(record):
        points = grid(record, finetune)
        gain, share = advantage(points), gain_kept(record, finetune, points)
        if gain is None:
            continue
        gains.append(gain)
        kept += [] if share is None else [share]
        rows.append(
            [
                finetune,
                norm_text(record.relative_delta_norm.get(finetune)),
                gain.rival.method,
                plain_text(gain.kl),
                bytes_text(gain.rival_bytes),
                f"{_BEFORE_BYTES[gain.bound]}{bytes_text(gain.subject_bytes)}",
                Strong(factor_text(gain)),
                percent_text(share),
            ]
        )
    if not rows:
        return []
    common, low = ratio_words(COMMON_RATIO), ratio_words(KEPT_RATIO)
    columns = (
        "fine-tune", "delta / base", f"best rival at {common}", "its KL", "its archive",
        f"{SUBJECT} at this KL", "smaller", f"gain kept at {low}",
    )  # fmt: skip
    notes = [
        gain_sentence(gains, kept),
        f"Rivals: {', '.join(RIVALS)}, asked for {common}. {SUBJECT}'s archive at the rival's KL: "
        "log KL taken as linear in log bytes between the sizes measured. Gain kept: share of the "
        "way from the base's exact match to the fine-tune's.",
    ]
    return [Table(f"{record.title}: what {SUBJECT} gains", columns, rows, notes, keys=1)]


def factor_text(gain: Advantage) -> str:
    """`3.1x`, `more than 3.1x`; `less than` where `auto` is never as near to the fine-tune."""
    return f"{gain.bound} {ratio_text(gain.factor)}".strip()


def gain_sentence(gains: Sequence[Advantage], kept: Sequence[float]) -> str:
    """The table in one sentence."""
    ordered_gains = sorted(gains, key=lambda gain: gain.factor)
    factors = list(dict.fromkeys(factor_text(gain) for gain in ordered_gains))
    text = (
        f"At the divergence that the best rival has at {ratio_words(COMMON_RATIO)}, {SUBJECT}'s "
        f"archive is smaller by a factor of {span(factors)}"
    )
    if kept:
        shares = list(dict.fromkeys(percent_text(share) for share in sorted(kept)))
        text += f"; at {ratio_words(KEPT_RATIO)} it keeps {span(shares)} of the gain in exact match"
    return text + "."


def span(texts: Sequence[str]) -> str:
    """`a` or `a to b`, of texts in order."""
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
