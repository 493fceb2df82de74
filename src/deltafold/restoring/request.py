"""What `restore`, `verify` and `inspect` are asked: every option once. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltafold.running.common import Clustered, OfArchive, Tasked, Writing
from deltafold.running.request import OUTPUT, WHAT, argument, asked, option, parse_bytes


@asked
class InspectRequest(OfArchive):
    """Show what an archive is and holds, without the base.

    From its manifest and headers; nothing is decoded. Returns sizes, settings, and one row a tensor.
    Raises ArchiveError.

    Example: deltafold inspect math.delta
    """

    tensors: bool = option(
        "List every tensor, not only sums by role.",
        default=False, flags=("-t",), identity=False, record=False, python=False,
    )  # fmt: skip


@asked
class RestoreRequest(Clustered, Writing, OfArchive):
    """Restore an archive to an ordinary Hugging Face folder.

    The weight files are laid out as the fine-tune's were (same names, order and metadata), unless
    `shard_bytes` says otherwise. Returns the record. Raises MismatchError for a wrong base, ArchiveError
    for a damaged archive; nothing is left under `output` then.

    Example: deltafold restore math.delta --base base/ -o restored/
    """

    base: str | Path = argument("The base: folder or hub id.", kw_only=False, flag="--base")
    output: str | Path = argument(
        "Folder to write.", kw_only=False, flag="--output", flags=("-o",), panel=OUTPUT
    )
    tensors: Sequence[str] | None = option(
        "Restore this tensor alone, into one file (repeatable).", default=None, flag="--tensor"
    )
    shard_bytes: int | None = option(
        "Largest weight file, e.g. 5GB. Default: as the fine-tune's.",
        default=None, panel=OUTPUT, flag="--shard-size", parse=parse_bytes, low=1,
    )  # fmt: skip


@asked
class VerifyRequest(Tasked, OfArchive):
    """Check an archive: every checksum; with --base that all decodes; with --against how close.

    With `against` (the fine-tune) exact tensors must come back bit for bit, and how far the others are
    off is measured. Returns the record. Raises ArchiveError or MismatchError on the first fault.

    Example: deltafold verify math.delta --base base/
    """

    base: str | Path | None = argument(
        "The base, to check that it is.", default=None, kw_only=False, flag="--base", panel=WHAT
    )
    against: str | Path | None = argument(
        "The fine-tune, to measure the distance.",
        default=None, kw_only=False, flag="--against", panel=WHAT,
    )  # fmt: skip
