"""The base of an archive under the names that the archive's tensors have."""

from __future__ import annotations

from deltafold.archive import Archive
from deltafold.checkpoint import AlignedCheckpoint, Checkpoint, Segment, fits_together
from deltafold.errors import MismatchError
from deltafold.restoring.decode import check_base_headers
from deltafold.restoring.named import give_base


def fitted_base(archive: Archive, base: Checkpoint) -> Checkpoint:
    """`base` as the archive refers to it, checked as far as headers tell.

    It is `base` itself unless some tensor refers to another name. It is closed with `base`. Raises
    MismatchError for a base that cannot be the archive's.
    """
    sources: dict[str, tuple[Segment, ...]] = {}
    for tensor in archive.manifest.tensors:
        if not tensor.counterpart:
            continue
        segments = tuple((each.name, *each.rows) for each in tensor.counterpart)
        if not fits_together(base, segments):
            wanted = ", ".join(dict.fromkeys(name for name, _, _ in segments))
            raise MismatchError(
                f"{base.label} is not the base of {archive.folder}: it has no such rows of "
                f"{wanted[:200]}; {give_base(archive)}."
            )
        sources[tensor.name] = segments
    fitted = AlignedCheckpoint(base, sources) if sources else base
    check_base_headers(archive, fitted)
    return fitted
