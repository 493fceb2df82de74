"""`factor` with what it costs and saves measured on tasks: the model before and after, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltafold.evaluation.before_after import scored
from deltafold.evaluation.plan import Request
from deltafold.factoring.factor import factor as factor_verb
from deltafold.running.devices import computes
from deltafold.running.record import Record
from deltafold.running.stored import storable


@storable
@computes
def factor(
    model: str | Path,
    output: str | Path,
    method: str = "lord",
    *,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    **settings: Any,
) -> Record:
    """Factor a model into the folder `output`; see `deltafold.factoring.factor` for `settings`.

    Args:
        tasks: files of rows, as `evaluate` takes them, that the model answers before and after; at
            most `limit` rows of each. Then the record also has tokens a second and bytes of weights.
        dtype: of that measurement; `auto` is the model's own.
        device: where to compute and to measure: `auto`, `cpu`, `cuda` or `cuda:N`. None computes on
            the CPU, and trains and measures on `cuda` if there is one.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    >>> factor("smollm2/", "small/", "lord", parameters=0.8, tasks=["sums.jsonl"])  # doctest: +SKIP
    """
    if not tasks:
        return factor_verb(model, output, method, **settings)
    request = Request(tuple(map(str, tasks)), batch_size=batch_size, limit=limit)
    return scored(factor_verb, request, model, output, method, "factored", dtype, device, settings)
