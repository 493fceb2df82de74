"""Reading an archive: random access by tensor, every part checked before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

import zstandard

from deltafold.archive.digest import TensorDigest, file_digest
from deltafold.archive.manifest import (
    MANIFEST_FILE,
    Manifest,
    Piece,
    SideFile,
    Tensor,
    read_manifest,
)
from deltafold.checkpoint import (
    Checkpoint,
    archive_folder,
    is_address,
    is_hub_id,
    local_folder,
)
from deltafold.checkpoint.contents import MAX_SIDE_FILE_BYTES
from deltafold.checkpoint.view import as_tensor
from deltafold.errors import ArchiveError, CheckpointError, not_shared
from deltafold.foreign import reading, shortage
from deltafold.lazy import torch

FILES_FOLDER = "files"


class Archive:
    """An archive on disk, or of a hub id, downloaded first.

    Opening reads the manifest and the payload's headers only.

    >>> with Archive(Path("math.delta")) as archive:                            # doctest: +SKIP
    ...     print(archive.manifest.method, len(archive.manifest.tensors))
    """

    def __init__(self, source: str | Path):
        self.folder = folder = archive_folder(source)
        self.manifest: Manifest = read_manifest(folder)
        self.by_name = {tensor.name: tensor for tensor in self.manifest.tensors}
        self._payload: dict[str, Checkpoint] = {}
        for entry in self.manifest.payload:
            file = folder / entry.name
            size_bytes = _size(file)
            if size_bytes is None:
                raise ArchiveError(f"{file} is missing; fetch the archive again.")
            if size_bytes != entry.n_bytes:
                raise ArchiveError(
                    f"{file} has {size_bytes:,} bytes where the manifest says "
                    f"{entry.n_bytes:,}; fetch the archive again."
                )
            with _as_archive(folder):
                shard = Checkpoint(file)
            for name in shard.tensors:
                if name in self._payload:
                    raise ArchiveError(f"{folder} stores part {name} twice; fetch it again.")
                self._payload[name] = shard
        self._check_parts_listed()

    def __reduce__(self) -> tuple[Callable[..., Archive], tuple[Path, str]]:
        return _opened_elsewhere, (self.folder.absolute(), self.identity)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        for shard in set(self._payload.values()):
            shard.close()

    def _check_parts_listed(self) -> None:
        promised = {
            tensor.part_name(piece, part)
            for tensor in self.manifest.tensors
            for piece in tensor.pieces
            for part in piece.parts
        }
        if missing := sorted(promised - set(self._payload)):
            raise ArchiveError(f"{self.folder} lacks part {missing[0]}; fetch the archive again.")
        if extra := sorted(set(self._payload) - promised):
            raise ArchiveError(f"{self.folder} holds part {extra[0]}, which no tensor names.")

    def parts(self, tensor: Tensor, piece: Piece) -> dict[str, torch.Tensor]:
        """All parts of a piece, by name, in their stored dtypes and shapes, checked.

        Raises ArchiveError on a flipped bit.
        """
        layout = self.part_layout(tensor, piece)
        return {part: as_tensor(data, *layout[part]) for part, data in self._checked(tensor, piece)}

    def check_parts(self, tensor: Tensor, piece: Piece) -> None:
        """Compare the checksums of all parts of a piece. Raises ArchiveError on a flipped bit."""
        for _ in self._checked(tensor, piece):
            pass

    def _checked(self, tensor: Tensor, piece: Piece) -> Iterator[tuple[str, bytearray]]:
        """Each part of a piece and its bytes, one at a time."""
        for part, checksum in piece.parts.items():
            name = tensor.part_name(piece, part)
            shard = self._payload[name]
            info = shard.tensors[name]
            with _as_archive(self.folder):
                data = shard.data(name)
            digest = TensorDigest(info.dtype, info.shape)
            digest.update(memoryview(data))
            if digest.checksum() != checksum:
                raise ArchiveError(
                    f"Part {name} in {info.file} is damaged (its checksum differs); "
                    "fetch the archive again."
                )
            yield part, data

    def part_layout(self, tensor: Tensor, piece: Piece) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each part of a piece, from the payload's header."""
        found = {part: self._payload[tensor.part_name(piece, part)] for part in piece.parts}
        infos = {part: s.tensors[tensor.part_name(piece, part)] for part, s in found.items()}
        return {part: (info.dtype, info.shape) for part, info in infos.items()}

    def part_bytes(self, tensor: Tensor, piece: Piece) -> int:
        """Bytes of a piece's parts in the payload."""
        names = [tensor.part_name(piece, part) for part in piece.parts]
        return sum(self._payload[name].tensors[name].n_bytes for name in names)

    def side_file(self, entry: SideFile, base: Checkpoint | None) -> bytes:
        """Content of a side file, from the archive or the base. Raises ArchiveError.

        `base` is needed unless the file is stored as a frame of its own (`zstd`).
        """
        base_data = b""
        if entry.stored != "zstd":
            if base is None:
                raise ArchiveError(f"{entry.name} of {self.folder} needs the base; give it.")
            file = base.path / entry.name
            if not file.is_file() or file_digest(base_data := _content(file)) != entry.base:
                raise ArchiveError(
                    f"{file} is missing or differs from the one this archive refers to; "
                    "use the base it was made from."
                )
        if not entry.is_stored:
            return base_data
        data = _decompress(self._frame(entry), entry, base_data)
        if data is None or file_digest(data) != entry.digest:
            raise self._damaged(entry)
        return data

    def check_side_file(self, entry: SideFile) -> bool:
        """Check what is stored of a small file, which is not nothing, without the base.

        False where it cannot be told: what is stored is relative to the base's file, and archives
        before version 3 have no digest of it. That it is there has been checked then. Raises
        ArchiveError.
        """
        if entry.stored == "zstd":
            self.side_file(entry, None)
            return True
        self._frame(entry)
        return entry.frame is not None

    def _frame(self, entry: SideFile) -> bytes:
        """What is stored of a small file, with the digest that it has. Raises ArchiveError."""
        stored = self._place(entry)
        if not stored.is_file():
            raise ArchiveError(f"{stored} is missing; fetch the archive again.")
        data = _content(stored)
        if entry.frame is not None and file_digest(data) != entry.frame:
            raise self._damaged(entry)
        return data

    def _place(self, entry: SideFile) -> Path:
        return self.folder / FILES_FOLDER / f"{entry.name}.zst"

    def _damaged(self, entry: SideFile) -> ArchiveError:
        return ArchiveError(f"{self._place(entry)} is damaged; fetch the archive again.")

    def strangers(self) -> list[str]:
        """Files that pass for the archive's own, and that it does not name: remains of another."""
        named = {self.folder / entry.name for entry in self.manifest.payload}
        named |= {self._place(entry) for entry in self.manifest.files if entry.is_stored}
        there = [*self.folder.glob("payload-*"), *(self.folder / FILES_FOLDER).rglob("*")]
        return sorted(
            file.relative_to(self.folder).as_posix()
            for file in there
            if file.is_file() and file not in named
        )

    @cached_property
    def identity(self) -> str:
        """Digest of the manifest, which holds a checksum of every part."""
        file = self.folder / MANIFEST_FILE
        with reading(file, ArchiveError):
            return file_digest(file.read_bytes())

    @property
    def n_bytes(self) -> int:
        """Everything in the archive's folder, in bytes."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


@cache
def _opened_elsewhere(folder: Path, identity: str) -> Archive:
    """An archive that came pickled from another process. Raises ClusterError if it is another."""
    try:
        found = Archive(folder)
        if found.identity == identity:
            return found
    except (ArchiveError, OSError):
        pass
    raise not_shared(folder)


def is_archive(source: str | Path) -> bool:
    """True for a folder that holds `delta.json`; a hub id or an address is downloaded to see."""
    folder = Path(source).expanduser()
    if not folder.exists() and (is_address(source) or is_hub_id(source)):
        folder = local_folder(source)
    return (folder / MANIFEST_FILE).is_file()


def _size(file: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    with reading(file, ArchiveError):
        return file.stat().st_size if file.is_file() else None


def _content(file: Path) -> bytes:
    """A small file's bytes; a large one is not read, and matches no digest."""
    with reading(file, ArchiveError):
        return file.read_bytes() if file.stat().st_size <= MAX_SIDE_FILE_BYTES else b""


@contextmanager
def _as_archive(folder: Path) -> Iterator[None]:
    """What is wrong with a payload file is wrong with the archive."""
    try:
        yield
    except CheckpointError as error:
        whole = ArchiveError(f"The archive {folder} is not whole: {error}")
        raise error if error.passing else whole from None


def _decompress(frame: bytes, entry: SideFile, base_data: bytes) -> bytes | None:
    if entry.n_bytes > MAX_SIDE_FILE_BYTES:
        return None
    dictionary = raw_dictionary(base_data) if entry.stored == "zstd-base" else None
    try:
        if zstandard.frame_content_size(frame) != entry.n_bytes:
            return None
        return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(
            frame, max_output_size=entry.n_bytes
        )
    except (zstandard.ZstdError, MemoryError) as error:
        if (lacking := shortage(error)) is not None:
            raise lacking from error
        return None


def raw_dictionary(data: bytes) -> zstandard.ZstdCompressionDict:
    """The base's file as a dictionary: what both have in common costs nothing."""
    return zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
