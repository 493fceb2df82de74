"""What an archive amounts to, from its manifest and headers: sizes, ratios, codecs."""

from __future__ import annotations

from typing import Any

from deltafold.archive import MANIFEST_FILE, Archive, Tensor
from deltafold.archive.reader import FILES_FOLDER
from deltafold.codecs import delta_codec, get
from deltafold.names import role_of


def archive_totals(archive: Archive) -> dict[str, Any]:
    """Sizes of an archive in true bytes, and the papers' nominal ratio."""
    total_bytes = archive.n_bytes
    files = archive.folder / FILES_FOLDER
    checkpoint_bytes = archive.manifest.finetuned.total_bytes
    return {
        "checkpoint_bytes": checkpoint_bytes,
        "archive_bytes": total_bytes,
        "file_ratio": checkpoint_bytes / total_bytes,
        "nominal_ratio": nominal_ratio(archive),
        "payload_bytes": sum(entry.n_bytes for entry in archive.manifest.payload),
        "manifest_bytes": (archive.folder / MANIFEST_FILE).stat().st_size,
        "files_bytes": sum(f.stat().st_size for f in files.rglob("*") if f.is_file()),
    }


def nominal_ratio(archive: Archive) -> float | None:
    """The papers' figure: 16 bit a weight of the linear layers / the values stored for them.

    None if no linear layer is stored by a lossy codec.
    """
    raw = stored = 0
    for tensor in archive.manifest.tensors:
        if role_of(tensor.name) in ("embedding", "head"):
            continue
        for piece in tensor.pieces:
            if not get(piece.codec).lossy:
                continue
            start, stop = tensor.piece_rows(piece)
            shape = (stop - start, tensor.matrix_shape[1])
            codec = delta_codec(piece.codec, archive.manifest.codecs[piece.codec].config)
            raw += shape[0] * shape[1] * codec.config.item_bytes
            stored += codec.value_bytes(shape, piece.settings)
    return raw / stored if stored else None


def tensor_bytes(tensor: Tensor, archive: Archive) -> int:
    """Payload bytes of one tensor."""
    return sum(archive.part_bytes(tensor, piece) for piece in tensor.pieces)


def codec_names(tensor: Tensor) -> str:
    """Codecs of a tensor, joined by "+"; `same-as` where it is stored under another name."""
    if tensor.same_as is not None:
        return "same-as"
    return "+".join(dict.fromkeys(piece.codec for piece in tensor.pieces)) or "skip"
