"""`fold` with what it costs and saves measured on tasks: the model before and after, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltafold.evaluation.before_after import scored
from deltafold.evaluation.plan import DEFAULT_ANSWERS, Request
from deltafold.folding.fold import fold as fold_verb
from deltafold.running.devices import computes
from deltafold.running.record import Record
from deltafold.running.stored import storable


@storable
@computes
def fold(
    model: str | Path,
    output: str | Path,
    method: str = "auto",
    *,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    answers: int = DEFAULT_ANSWERS,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    **settings: Any,
) -> Record:
    """Fold a model into the folder `output`; see `deltafold.folding.fold.fold` for `settings`.

    Args:
        tasks: files of rows, as `evaluate` takes them, that the model answers before and after; at
            most `limit` rows of each. Then the record also has tokens a second, bytes of weights, and
            what both wrote to the first `answers` rows of each.
        dtype: of that measurement; `auto` is the model's own.
        device: where to compute and to measure: `auto`, `cpu`, `cuda` or `cuda:N`. None computes on
            the CPU, and trains and measures on `cuda` if there is one.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    >>> fold("smollm2/", "smaller/", blocks=6, tasks=["sums.jsonl"])            # doctest: +SKIP
    """
    if not tasks:
        return fold_verb(model, output, method, **settings)
    request = Request(tuple(map(str, tasks)), batch_size=batch_size, limit=limit, answers=answers)
    return scored(fold_verb, request, model, output, method, "folded", dtype, device, settings)
