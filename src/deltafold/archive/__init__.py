"""Our own artefact: manifest, payload shards, integrity, random access by tensor."""

from deltafold.archive.digest import TensorDigest, file_digest
from deltafold.archive.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    BaseRows,
    CodecEntry,
    Manifest,
    Piece,
    SideFile,
    Source,
    Tensor,
    read_manifest,
)
from deltafold.archive.reader import Archive, is_archive

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "Archive",
    "BaseRows",
    "CodecEntry",
    "Manifest",
    "Piece",
    "SideFile",
    "Source",
    "Tensor",
    "TensorDigest",
    "file_digest",
    "is_archive",
    "read_manifest",
]
