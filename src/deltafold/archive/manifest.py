"""`delta.json`: what an archive is. Read from disk, so every field is checked and none is trusted.

The file ends with a checksum of all that stands before it: a flipped bit in a seed or a setting
would otherwise decode to other weights without a sign.

`docs/format.md` describes each field for someone who writes another reader.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltafold.checkpoint.contents import (
    ARCHIVE_FILE,
    INDEX_FILE,
    folder_of,
    is_foreign,
    is_plain_path,
)
from deltafold.dtypes import BITS, ITEM_BYTES, held_shape, matrix_shape
from deltafold.errors import ArchiveError
from deltafold.foreign import unread

FORMAT = "deltafold-archive"
FORMAT_VERSION = 3
MANIFEST_FILE = ARCHIVE_FILE
MAX_MANIFEST_BYTES = 1 << 30
_SEAL = re.compile(r',"checksum":"([0-9a-f]{32})"\}\n\Z')

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


def _plain(name: str) -> str:
    if not is_plain_path(name):
        raise ValueError(f"{name!r} is no plain name of a file inside its folder")
    return name


PlainPath = Annotated[str, AfterValidator(_plain)]
Size = Annotated[int, Field(ge=0, le=1 << 50)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Piece(_Strict):
    """Consecutive rows of one tensor under one codec."""

    codec: str
    rows: tuple[Size, Size] | None = None  # None: all rows
    reference: Literal["base", "none"] = "base"
    settings: dict[str, int | float | str] = {}
    parts: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")], Checksum] = {}
    why: str | None = None
    error: float | None = None  # ||D - D^|| / ||D||; None: exact


class BaseRows(_Strict):
    """Rows of one of the base's tensors, seen as a matrix."""

    name: str
    rows: tuple[Size, Size]


class Tensor(_Strict):
    """One tensor of the fine-tune."""

    name: str
    dtype: str
    shape: tuple[Size, ...]
    file: Size  # which of the fine-tune's weight files held it
    base: Digest | None = None
    counterpart: tuple[BaseRows, ...] = ()  # what `base` is of; (): the base's of the same name
    tuned: Digest
    restored: Checksum | None = None  # what it decodes to, where that is not `tuned`
    same_as: str | None = None  # stored once, under that name
    pieces: tuple[Piece, ...] = ()

    @property
    def lossy(self) -> bool:
        """True if some of it is approximated."""
        return any(piece.error is not None for piece in self.pieces)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return matrix_shape(self.dtype, self.shape)

    def piece_rows(self, piece: Piece) -> tuple[int, int]:
        return piece.rows or (0, self.matrix_shape[0])

    def part_name(self, piece: Piece, part: str) -> str:
        """Name in the payload: `tensor::part`, or `tensor::index.part` where pieces are several."""
        if len(self.pieces) == 1:
            return f"{self.name}::{part}"
        number = next(n for n, one in enumerate(self.pieces) if one is piece)
        return f"{self.name}::{number}.{part}"

    @model_validator(mode="after")
    def _sound(self) -> Tensor:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name} has the unknown dtype {self.dtype!r}")
        held_shape(self.dtype, self.shape)
        if self.name == "__metadata__":
            raise ValueError("no tensor can be called __metadata__")
        if any(each.rows[0] > each.rows[1] for each in self.counterpart):
            raise ValueError(f"the counterpart of tensor {self.name} ends before it starts")
        if self.same_as is not None:
            return self
        at = 0
        for piece in self.pieces:
            start, stop = self.piece_rows(piece)
            if start != at or stop < start:
                raise ValueError(f"the pieces of tensor {self.name} do not follow one another")
            at = stop
        if at != self.matrix_shape[0]:
            raise ValueError(f"the pieces of tensor {self.name} do not cover it")
        return self


class SideFile(_Strict):
    """A small file of the fine-tune: taken from the base, or stored (zstd) under `files/`."""

    name: PlainPath
    n_bytes: Size
    digest: Digest
    stored: Literal["base", "zstd", "zstd-base"]
    """`base`: equals the base's file; `zstd`: a frame; `zstd-base`: the base's file is its dictionary"""
    base: Digest | None = None
    frame: Digest | None = None  # of the stored bytes, where only the base tells what they hold

    @property
    def is_stored(self) -> bool:
        """True if the archive has a file for it."""
        return self.stored != "base"

    @model_validator(mode="after")
    def _sound(self) -> SideFile:
        if self.frame is not None and self.stored != "zstd-base":
            raise ValueError(
                f"the small file {self.name} has a digest of a frame that it needs not"
            )
        return self


class CodecEntry(_Strict):
    version: int
    config: dict[str, int | float | str] = {}


class PayloadFile(_Strict):
    name: Annotated[str, Field(pattern=r"^payload-\d{5}-of-\d{5}\.safetensors$")]
    n_bytes: Size


class Source(_Strict):
    """How the weights lay on disk. `label` is empty; in archives of earlier releases it is a name."""

    label: str = ""
    total_bytes: Size
    files: tuple[PlainPath, ...]
    metadata: dict[str, str] = {}


class Manifest(_Strict):
    format: Literal["deltafold-archive"] = "deltafold-archive"
    format_version: Literal[1, 2, 3] = 1  # see `version_of`
    tool_version: str
    method: str
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    budget: dict[str, float | str] = {}
    codecs: dict[str, CodecEntry]
    base: Source
    finetuned: Source
    removed: dict[str, Digest] = {}  # tensors only in the base
    payload: tuple[PayloadFile, ...]
    files: tuple[SideFile, ...]
    tensors: tuple[Tensor, ...]
    totals: dict[str, int | float] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is listed twice")
        _check_files(self.finetuned.files, [entry.name for entry in self.files])
        known = {tensor.name: tensor for tensor in self.tensors}
        if self.format_version < version_of(self.tensors, self.files):
            raise ValueError(
                f"format version {self.format_version} has no field frame, restored or counterpart, "
                "nor newer dtypes, as they are used here"
            )
        for entry in self.files:
            if self.format_version > 2 and entry.stored == "zstd-base" and entry.frame is None:
                raise ValueError(f"the small file {entry.name} has no digest of its frame")
        for tensor in self.tensors:
            target = known.get(tensor.same_as) if tensor.same_as else None
            if tensor.same_as and (
                target is None
                or target.same_as is not None
                or target.shape != tensor.shape
                or target.dtype != tensor.dtype
            ):
                raise ValueError(
                    f"tensor {tensor.name} refers to {tensor.same_as}, which is no twin"
                )
            if self.format_version > 1 and tensor.lossy and tensor.restored is None:
                raise ValueError(f"tensor {tensor.name} has no digest of what it restores to")
            if tensor.restored is not None and not tensor.lossy:
                raise ValueError(f"tensor {tensor.name} is exact and restores to itself")
            if tensor.file >= len(self.finetuned.files):
                raise ValueError(f"tensor {tensor.name} lies in a file that is not listed")
            if not tensor.name.startswith(folder_of(self.finetuned.files[tensor.file])):
                raise ValueError(f"tensor {tensor.name} is not named after the folder of its file")
            if tensor.counterpart and (tensor.base is None or self.format_version < 2):
                raise ValueError(f"tensor {tensor.name} cannot have a counterpart here")
            for piece in tensor.pieces:
                if piece.codec not in self.codecs:
                    raise ValueError(f"codec {piece.codec} of tensor {tensor.name} is not listed")
                if piece.reference == "base" and tensor.base is None:
                    raise ValueError(f"tensor {tensor.name} refers to a base that it does not have")
        return self

    def to_text(self) -> str:
        """JSON: one line a tensor, so that a person can grep it and a diff shows what changed."""
        body = self.model_dump(mode="json", exclude_none=True, exclude={"tensors"})
        head = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        lines = [
            json.dumps(
                tensor.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
                separators=(",", ":"),
                ensure_ascii=False,
            )
            for tensor in self.tensors
        ]
        return sealed(head[:-1] + ',"tensors":[\n' + ",\n".join(lines) + "\n]")


def version_of(tensors: Iterable[Tensor], files: Iterable[SideFile]) -> int:
    """The oldest version of the format that can say this: readers of that version then can read it."""
    if any(entry.frame is not None for entry in files):
        return 3
    new = any(t.restored is not None or t.counterpart or t.dtype in BITS for t in tensors)
    return 2 if new else 1


def _check_files(weights: tuple[str, ...], beside: list[str]) -> None:
    """No file may take another's place, on any system, nor pass for weights."""
    files = [*weights, *beside, INDEX_FILE]
    if len(set(files)) != len(files):
        raise ValueError("a file of the fine-tune is listed twice")
    taken = {name.casefold() for name in (*weights, INDEX_FILE)}
    for name in beside:
        if is_foreign(name) or name.casefold() in taken:
            raise ValueError(f"the small file {name} would pass for weights")
    folders = {
        "/".join(parts[:n]) for f in files for parts in [f.split("/")] for n in range(1, len(parts))
    }
    if clash := sorted({name.casefold() for name in files} & {each.casefold() for each in folders}):
        raise ValueError(f"{clash[0]} is a file and a folder of the fine-tune")


def sealed(text: str) -> str:
    """`text`, a JSON object without its last brace, closed by a checksum of itself."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return f'{text},"checksum":"{digest}"}}\n'


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/delta.json`. Raises ArchiveError with one sentence."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ArchiveError(f"{folder} is not an archive: it holds no {MANIFEST_FILE}.")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArchiveError(f"{path} is absurdly large; it is not to be trusted.")
    try:
        text = path.read_bytes().decode()
        raw: Any = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ArchiveError(f"{path} is not a deltafold manifest.")
        version = raw.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ArchiveError(
                f"{path} has format version {version}, newer than this deltafold reads "
                f"({FORMAT_VERSION}); upgrade deltafold."
            )
        seal = _SEAL.search(text)
        if seal is None or sealed(text[: seal.start()]) != text:
            raise ArchiveError(
                f"{path} is damaged or was edited: its checksum differs; fetch the archive again."
            )
        del raw["checksum"]
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the manifest"
        message = re.sub(r"^Value error, ", "", first["msg"])
        raise ArchiveError(
            f"{path} is damaged or was edited: {where}: {message}; fetch the archive again."
        ) from None
    except OSError as error:
        raise unread(error, path, ArchiveError) from None
    except (ValueError, RecursionError) as error:
        raise ArchiveError(
            f"{path} is not valid JSON ({error}); fetch the archive again."
        ) from None
