"""PNG figures of records: `figures_of(records, folder)`.

Adding a figure is one function in `drawings/` and one row in `FIGURES`. A function gets all records
and the colours, and yields (name of the file, figure) as often as it has something to show.
The same records give the same bytes: no time, no version is written into a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltafold.errors import StorageError, UsageError
from deltafold.foreign import shortage
from deltafold.reporting.drawings import (
    delta_cosines,
    error_by_block,
    folding,
    frontier,
    role_bytes,
    sharing,
    size_quality,
    spectra,
)
from deltafold.reporting.records import KnownRecord, understood
from deltafold.reporting.style import DARK, DPI, LIGHT, Ink, settings
from deltafold.running.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Sequence[KnownRecord], Ink], Iterator[tuple[str, "Figure"]]]

FIGURES: tuple[Draw, ...] = (
    size_quality.draw,
    frontier.draw,
    role_bytes.draw,
    error_by_block.draw,
    spectra.draw,
    delta_cosines.draw,
    folding.draw,
    sharing.draw,
)


def figures_of(
    records: Iterable[Record | KnownRecord], folder: Path, dark: bool = False
) -> list[Path]:
    """Draw all that the records have to show; returns the files written, in order.

    Files of dark figures end in `-dark.png`, so that both kinds can lie in one folder. Raises
    UsageError if matplotlib is missing, DeltafoldError on a record that cannot be understood,
    StorageError if the folder cannot be written.
    """
    try:
        from matplotlib import rc_context, rcdefaults, rcParams
    except ImportError:
        raise UsageError("Figures need matplotlib: pip install 'deltafold[figures]'.") from None

    known = [understood(record) for record in records]
    ink = DARK if dark else LIGHT
    options: Any = settings(ink)  # matplotlib's own type lists every name of a setting
    written: list[Path] = []
    with rc_context():
        rcdefaults()  # a figure must not depend on its reader's own settings of matplotlib
        rcParams.update(options)
        for draw in FIGURES:
            for name, figure in draw(known, ink):
                path = _free(folder, name, "-dark" if dark else "", written)
                _save(figure, path)
                written.append(path)
    return written


def _free(folder: Path, name: str, end: str, written: list[Path]) -> Path:
    """A path that this call has not used: two archives of one name get a number."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    path, number = folder / f"{slug}{end}.png", 2
    while path in written:
        path, number = folder / f"{slug}-{number}{end}.png", number + 1
    return path


def _save(figure: Figure, path: Path) -> None:
    working = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            working,
            format="png",
            dpi=DPI,
            bbox_inches="tight",
            pad_inches=0.15,
            metadata={"Software": None},
        )
        working.replace(path)
    except OSError as error:
        raise shortage(error, path) or StorageError(
            f"{path} cannot be written ({error.strerror}); choose another."
        ) from None
