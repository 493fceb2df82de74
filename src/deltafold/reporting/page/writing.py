"""Fills the page's template: views as JSON, the colours of `style.py`, nothing from elsewhere.

JSON goes into a script element, where `<` would let a tensor's name end it; so `<`, `>` and `&` are
written as escapes. The page's script puts every text in as text, never as markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltafold.reporting.markdown import write_text
from deltafold.reporting.page.answers import samples_of
from deltafold.reporting.page.compress import compress_view
from deltafold.reporting.page.fold import fold_view
from deltafold.reporting.page.merge import merge_view
from deltafold.reporting.page.view import View
from deltafold.reporting.records import KnownRecord, understood
from deltafold.reporting.records.compress import CompressRecord
from deltafold.reporting.records.evaluate import EvaluateRecord
from deltafold.reporting.style import DARK, LIGHT, ROLE_LOOKS, Ink
from deltafold.reporting.table import Strong, Table
from deltafold.reporting.tables import tables_of
from deltafold.reporting.wording import described
from deltafold.running.record import Record


def evaluate_view(record: EvaluateRecord) -> View:
    """Answers side by side; the figures are in the tables."""
    last = record.models[-1].label if record.models else "models"
    return View(
        kind="evaluate",
        title=last,
        sentence=f"{len(record.models)} models, measured under one setting.",
        samples=samples_of(record.models),
    )


VIEWS: dict[str, Callable[[Any], View]] = {
    "compress": compress_view,
    "merge": merge_view,
    "fold": fold_view,
    "evaluate": evaluate_view,
}


def write_page(records: Sequence[Record | KnownRecord], path: Path) -> None:
    """Write the page of these runs, one below another. Raises DeltafoldError, StorageError."""
    write_text(path, page_html(records))


def page_html(records: Sequence[Record | KnownRecord]) -> str:
    """The page as text; the same records give the same bytes.

    An evaluation of an archive, given beside the record of the compression, goes into its page.
    """
    known = _joined([understood(record) for record in records])
    runs = [_run(record) for record in known]
    template = {name: _part(name) for name in ("page.html", "page.css", "page.js")}
    data = json.dumps(runs, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    title = " · ".join(run["view"]["title"] for run in runs)
    # One pass: what is put in is never searched for places again.
    filled = {
        "title": html.escape(title),
        "css": template["page.css"].replace("/*colours*/", _colours()),
        "js": template["page.js"],
        "data": data,
    }
    pieces = template["page.html"].split("{{")
    return pieces[0] + "".join(
        filled[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:])
    )


def _part(name: str) -> str:
    return files("deltafold.reporting.page").joinpath(name).read_text(encoding="utf-8")


def _joined(records: list[KnownRecord]) -> list[KnownRecord]:
    """Evaluations moved into the compressions that they speak of."""
    kept: list[KnownRecord] = []
    used: set[int] = set()
    evaluations = [record for record in records if isinstance(record, EvaluateRecord)]
    for record in records:
        if isinstance(record, CompressRecord) and not record.scores:
            for found in evaluations:
                if any(
                    model.role == "candidate" and Path(model.label).name == record.title
                    for model in found.models
                ):
                    chosen = [
                        model
                        for model in found.models
                        if model.role != "candidate" or Path(model.label).name == record.title
                    ]
                    record = record.model_copy(update={"scores": chosen})
                    used.add(id(found))
                    break
        kept.append(record)
    return [record for record in kept if id(record) not in used]


def _run(record: KnownRecord) -> dict[str, Any]:
    """All that the page is given of one run."""
    make = VIEWS.get(record.kind)
    tables = tables_of(record)
    if make is not None:
        view = make(record)
    else:
        title = getattr(record, "title", "") or record.kind
        view = View(record.kind, title, f"A record of the kind {record.kind}.")
    machine = [
        (name.replace("_bytes", ""), described(name, value))
        for name, value in record.machine.items()
        if value is not None
    ]
    return {
        "view": asdict(view),
        "tables": [_table(table) for table in tables],
        "command": record.command,
        "settings": [(name, described(name, value)) for name, value in record.settings.items()],
        "machine": machine,
    }


def _table(table: Table) -> dict[str, Any]:
    cells = [
        [{"text": c.text, "strong": True} if isinstance(c, Strong) else {"text": c} for c in row]
        for row in table.rows
    ]
    return {
        "title": table.title, "columns": list(table.columns), "rows": cells, "notes": table.notes,
        "left": table.left,
    }  # fmt: skip


def _colours() -> str:
    """Custom properties of both grounds."""

    def of(ink: Ink) -> str:
        neutral = {"ground": ink.ground, "text": ink.text, "muted": ink.muted, "line": ink.grid}
        roles = {f"role-{name}": look.colour(ink) for name, look in ROLE_LOOKS.items()}
        return "".join(f"--{name}:{value};" for name, value in (neutral | roles).items())

    dark = of(DARK)
    return (
        f":root{{{of(LIGHT)}}}\n"
        f"@media (prefers-color-scheme: dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f":root[data-theme=dark]{{{dark}}}"
    )
