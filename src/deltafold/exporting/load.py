"""`load`: an archive on its base, or a composed model, as a ready `transformers` model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltafold.composed.load import is_shared, load_shared
from deltafold.errors import UsageError
from deltafold.restoring.load import load_archive
from deltafold.running.engine import Progress


def load(
    archive: str | Path,
    base: str | Path | None = None,
    *,
    deltas: Mapping[str, str | Path] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    **from_pretrained: Any,
) -> Any:
    """A ready `transformers` model: the fine-tune of `archive` on `base`, or a composed model.

    With `deltas` the one argument is the base, and the result holds it once, with an adapter for
    each fine-tune by name (see `Together`): `load("llama/", deltas={"math": "math.delta"})`.
    What `share` and `factor` write is whole in itself: `load(folder)`, without a base.

    `from_pretrained` takes what `AutoModelForCausalLM.from_pretrained` takes (dtype, device_map,
    attn_implementation, ...). The dtype defaults to that of the checkpoint. Raises ArchiveError,
    MismatchError, UsageError.
    """
    if deltas is not None:
        from deltafold.exporting.together import load_together

        if base is not None:
            raise UsageError("With deltas give one base, and the archives by name in deltas.")
        return load_together(archive, deltas, workers=workers, progress=progress, **from_pretrained)
    if is_shared(archive):
        return load_shared(archive, **from_pretrained)
    if base is None:
        raise UsageError(f"{archive} is not a model by itself; give the base of the archive, too.")
    return load_archive(archive, base, workers=workers, progress=progress, **from_pretrained)
