"""`deltafold compress`."""

from __future__ import annotations

from typing import Any

from deltafold.cli.command import Extras, command, record_place
from deltafold.cli.method_settings import METHOD_SETTINGS, with_method_settings
from deltafold.compressing.request import CompressRequest


def _announce(request: CompressRequest) -> None:
    """On a terminal before any work. Elsewhere with the summary: what is refused has one sentence."""
    from deltafold.cli.show import out, say_sides

    if out.is_terminal:
        say_sides(request.base, request.finetuned)


def _show(record: dict[str, Any], request: CompressRequest) -> None:
    from deltafold.cli.show import out, say_sides

    if not out.is_terminal:
        say_sides(request.base, request.finetuned)
    if request.dry_run:
        from deltafold.cli.plan import show_plan

        show_plan(record, request)
        return
    from collections import Counter

    from deltafold.cli.show import device_lines, duration, left_out_lines, say, size

    totals, budget = record["totals"], record["budget"]
    say(
        f"[bold]{record['archive']}[/bold]  {size(totals['checkpoint_bytes'])} -> "
        f"[bold]{size(totals['archive_bytes'])}[/bold], "
        f"[bold]{totals['file_ratio']:.2f}x[/bold] smaller on disk, everything counted"
    )
    if budget["asked"] is not None:
        kind = budget["kind"].replace("_", " ")
        got = "nothing to approximate" if budget["got"] is None else f"got {_number(budget['got'])}"
        say(f"  {kind}: asked {_number(budget['asked'])}, {got}")
        if (
            budget["kind"] != "bytes"
            and budget["got"] is not None
            and budget["got"] > 1.01 * budget["asked"]
        ):
            say("  smaller than asked: this method has no use for more bytes here")
    if budget["kind"] != "nominal_ratio" and totals["nominal_ratio"]:
        say(f"  nominal ratio, as papers count: {totals['nominal_ratio']:.1f}")
    codecs = Counter(row["codec"] for row in record["tensors"])
    say("  tensors: " + ", ".join(f"{n} {codec}" for codec, n in codecs.most_common()))
    for line in _pairing_lines(record["pairing"]):
        say(line)
    for tried in record.get("tried", []):
        named = ", ".join(
            f"{'C' if k == 'c' else k.replace('_', ' ')} {v:g}"
            for k, v in tried["settings"].items()
        )
        kept = "  <- kept" if tried.get("kept") else ""
        say(f"  {named}: {tried['criterion']} {tried['value']:.4g}{kept}")
    if why := record.get("calibration", {}).get("why"):
        say(f"  all values count alike: {why}")
    trained = record.get("distill")
    if trained and not trained["values"]:
        say(
            "  nothing was trained: no number that is stored here can move; KL on samples held out "
            f"{trained['kl_after']:.4g}"
        )
    elif trained:
        say(
            f"  distilled {trained['steps']} steps: KL on samples held out "
            f"{trained['kl_before']:.4g} -> {trained['kl_after']:.4g}; kept: {trained['kept']}"
        )
    for row in record.get("scores", []):
        shares = ", ".join(
            f"{name} {(found.get('exact_match') or found['accuracy'])['value']:.1%}"
            for name, found in row["metrics"]["tasks"].items()
        )
        say(f"  {row['label']}: {shares}")
    for line in [*left_out_lines(record), *device_lines(record)]:
        say(line)
    say(
        f"  {duration(record['seconds'])}, peak memory {size(record['peak_memory_bytes'])}; "
        f"record in {record_place(request.record, request.output)}"
    )


def _pairing_lines(pairing: dict[str, Any]) -> list[str]:
    """How names were looked past, and what has no counterpart in the base, if it is notable."""
    from rich.markup import escape

    from deltafold.compressing.shortfall import NOTABLE_SHARE, in_words

    lines = []
    if rules := pairing["rules"]:
        more = f" and {len(rules) - 6} more" if len(rules) > 6 else ""
        lines.append("  names of the fine-tune in the base: " + "; ".join(rules[:6]) + more)
    if (alone := pairing["only_in_finetuned"])["share"] >= NOTABLE_SHARE:
        lines.append(f"  only in the fine-tune, stored whole: {in_words(alone)}")
    return [escape(line) for line in lines]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


compress = command(
    CompressRequest,
    "deltafold.compressing.compress:run_compress",
    _show,
    extras=Extras(with_method_settings, [*METHOD_SETTINGS.values()]),
    announce=_announce,
)
