"""Which side is the base: what a run says first, and pairs that look swapped."""

from __future__ import annotations

import math
import re
from pathlib import Path

from deltafold.archive import MANIFEST_FILE, TensorDigest
from deltafold.archive.manifest import read_manifest
from deltafold.checkpoint import Checkpoint, local_folder, open_checkpoint, tensor_bytes
from deltafold.checkpoint.json_files import read_object
from deltafold.checkpoint.kinds import ADAPTER_FILE, adapter_folder
from deltafold.compressing.pair import Pair
from deltafold.errors import ArchiveError, CheckpointError, UsageError

_CARD_BASE = re.compile(r"^base_model:[ \t]*(?:\n\s*-\s*)?[\"']?([^\s\"']+)", re.M)
_CARD_BYTES = 1 << 16
_CHUNK_BYTES = 8 << 20


def sides(base: str | Path, finetuned: str | Path) -> list[tuple[str, int]]:
    """What is shown of base and fine-tune before any work: name and bytes. Raises CheckpointError."""
    return [_side(base), _side(finetuned)]


def _side(source: str | Path) -> tuple[str, int]:
    if (folder := adapter_folder(local_folder(source))) is not None:
        return f"{source}, an adapter", (folder / ADAPTER_FILE).stat().st_size
    with open_checkpoint(source) as opened:
        return opened.label, opened.total_bytes


def check_order(pair: Pair, output: Path) -> None:
    """Ask about a pair that looks swapped. Raises UsageError."""
    if why := looks_swapped(pair, output):
        raise UsageError(
            f"Base and fine-tune look swapped: {why}; give {pair.finetuned.label} as the base, or "
            "add --as-given (as_given=True) if they are not."
        )


def looks_swapped(pair: Pair, output: Path | None = None) -> str | None:
    """Why the fine-tune looks like the base of the base, if it does."""
    base, tuned = pair.origin, pair.finetuned
    if output is not None and _made_the_other_way(output, base, tuned):
        return f"{output} was made with {tuned.label} as its base"
    if _says_it_comes_from(base, tuned) and not _says_it_comes_from(tuned, base):
        return f"{base.label} says that it was made from {tuned.label}"
    if _has_chat_template(base) and not _has_chat_template(tuned):
        return f"{base.label} has a chat template and {tuned.label} has none"
    return None


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.path.absolute().name if checkpoint.path.exists() else checkpoint.label


def _made_the_other_way(output: Path, base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether the archive that is to be overwritten has the two in the other order.

    An output is a place, never a hub id: `out/x.delta` is written like one.
    """
    try:
        manifest = read_manifest(output) if (output / MANIFEST_FILE).is_file() else None
    except ArchiveError:
        return False
    changed = [
        each
        for each in (manifest.tensors if manifest else ())
        if each.base is not None
        and each.base != each.tuned
        and not each.counterpart
        and each.name in base.tensors
        and each.name in tuned.tensors
    ]
    if not changed:
        return False
    least = min(changed, key=lambda each: (math.prod(each.shape), each.name))
    return (_digest(tuned, least.name), _digest(base, least.name)) == (least.base, least.tuned)


def _digest(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.tensors[name]
    digest = TensorDigest(info.dtype, info.shape)
    for _, rows in checkpoint.row_chunks(name, _CHUNK_BYTES):
        digest.update(tensor_bytes(rows))
    return digest.identity()


def _says_it_comes_from(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether the model card or the config of one names the other as what it was made from."""
    named = [one.config().get("_name_or_path")]
    card = one.path / "README.md"
    if card.is_file():
        named += _CARD_BASE.findall(card.read_text(errors="replace")[:_CARD_BYTES])
    wanted = {_name(other), other.label, other.label.partition("@")[0]}
    if _name(one) == _name(other):
        return False
    return any(isinstance(n, str) and (n in wanted or Path(n).name in wanted) for n in named)


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    if checkpoint.path.is_file():
        return False
    if any(checkpoint.path.glob("chat_template*")):
        return True
    try:
        told = read_object(checkpoint.path / "tokenizer_config.json") or {}
    except CheckpointError:
        return False
    return bool(told.get("chat_template"))
