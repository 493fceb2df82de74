"""`share` with what it costs measured on tasks and texts: the model before and after, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltafold.evaluation.before_after import scored
from deltafold.evaluation.plan import Request
from deltafold.running.devices import computes
from deltafold.running.record import Record
from deltafold.running.stored import storable
from deltafold.sharing.share import share as share_verb


@storable
@computes
def share(
    model: str | Path,
    output: str | Path,
    method: str = "deltallm",
    *,
    tasks: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    **settings: Any,
) -> Record:
    """Share weights between blocks; see `deltafold.sharing.share.share` for `settings`.

    Args:
        tasks, texts: files, as `evaluate` takes them, that the model is measured on before and after;
            of a task at most `limit` rows. Then the record also has tokens a second.
        dtype: of that measurement; `auto` is the model's own.
        device: where to compute and to measure: `auto`, `cpu`, `cuda` or `cuda:N`. None computes on
            the CPU, and trains and measures on `cuda` if there is one.

    Returns the record. Raises DeltafoldError; nothing is left under `output` then.

    >>> share("smollm2/", "shared/", parameters=0.88, texts=["held.txt"])       # doctest: +SKIP
    """
    if not tasks and not texts:
        return share_verb(model, output, method, **settings)
    request = Request(
        tuple(map(str, tasks)), tuple(map(str, texts)), batch_size=batch_size, limit=limit
    )
    return scored(share_verb, request, model, output, method, "shared", dtype, device, settings)
