"""One tensor back from base and archive, as rows in the stored dtype.

The base's tensor is hashed before it is used: a wrong base is refused by the tensor's name. What
comes out is hashed, too: it is the fine-tune's tensor, or what `compress` decoded where that was
approximated. Every step of decoding gives the same bits on every machine (`coding/sums.py`) and
whatever torch is set to (`running/neutral.py`), so that other bits are a fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

from deltafold.archive import Archive, Piece, Tensor, TensorDigest
from deltafold.archive.manifest import Manifest
from deltafold.checkpoint import (
    DTYPES,
    Checkpoint,
    tensor_bytes,
)
from deltafold.codecs import delta_codec, exact_codec, get, names
from deltafold.codecs.base import DeltaCodec
from deltafold.coding.counter import derive_key
from deltafold.coding.sums import rounded_sum
from deltafold.dtypes import ITEM_BYTES, held_shape
from deltafold.errors import ArchiveError, DeltafoldError, MismatchError, UsageError, nearest
from deltafold.foreign import shortage
from deltafold.lazy import torch
from deltafold.restoring.named import give_base
from deltafold.running.neutral import undisturbed

CHUNK_BYTES = 8 << 20
MAX_EXACT_BYTES = 1 << 28  # an exact piece of a sound archive is far smaller

# What codecs raise on parts or settings that do not fit together, whatever was edited.
_UNSOUND = (
    ValueError, KeyError, IndexError, TypeError, ArithmeticError, RuntimeError, MemoryError,
    UsageError,
)  # fmt: skip


def check_codecs(archive: Archive) -> None:
    """Every codec of the archive must be known here, in a version that this package reads, and
    every piece must fit its codec, as far as headers tell. Raises ArchiveError.
    """
    for name, entry in archive.manifest.codecs.items():
        if name not in names():
            raise ArchiveError(
                f"{archive.folder} uses the codec {name!r}, which this deltafold does not have; "
                "upgrade, or install the package that brings it."
            )
        if entry.version > get(name).version:
            raise ArchiveError(
                f"{archive.folder} uses version {entry.version} of codec {name}, newer than this "
                f"deltafold reads ({get(name).version}); upgrade deltafold."
            )
    for tensor in archive.manifest.tensors:
        for piece in tensor.pieces:
            try:
                _check_piece(archive, tensor, piece)
            except _UNSOUND as error:
                raise _damaged(archive, tensor, error) from error


def _check_piece(archive: Archive, tensor: Tensor, piece: Piece) -> None:
    """Sizes that a piece promises must be those of its parts. Raises one of `_UNSOUND`."""
    start, stop = tensor.piece_rows(piece)
    columns = tensor.matrix_shape[1]
    lossy = get(piece.codec).lossy
    if (lossy or piece.codec == "skip") and piece.reference != "base":
        raise ValueError(f"codec {piece.codec} needs the base")
    if lossy:
        layout = _codec_of(archive, piece).layout((stop - start, columns), piece.settings)
        stored = archive.part_layout(tensor, piece)
        for part, spec in layout.items():
            if stored.get(part) != (spec.dtype_name, spec.shape):
                raise ValueError(f"part {part!r} is not as its settings say")
        return
    exact_bytes = (stop - start) * columns * ITEM_BYTES[tensor.dtype]
    if piece.codec != "skip" and exact_bytes > MAX_EXACT_BYTES:
        raise ValueError("an exact piece is absurdly large")


def _damaged(archive: Archive, tensor: Tensor, error: Exception) -> DeltafoldError:
    """What to raise where decoding fails; memory that runs out is not the archive's fault."""
    return shortage(error) or ArchiveError(
        f"Tensor {tensor.name} of {archive.folder} cannot be decoded "
        f"({error or type(error).__name__}); fetch the archive again."
    )


def check_base_headers(archive: Archive, base: Checkpoint) -> None:
    """Refuse, from headers alone, a base that cannot be the archive's."""
    for tensor in archive.manifest.tensors:
        if tensor.base is None:
            continue
        found = base.tensors.get(tensor.name)
        if found is None:
            raise MismatchError(
                f"{base.label} is not the base of {archive.folder}: it has no tensor "
                f"{tensor.name}; {give_base(archive)}."
            )
        rows = [tensor.piece_rows(p)[1] for p in tensor.pieces if p.reference == "base"]
        if (
            found.matrix_shape[1] != tensor.matrix_shape[1]
            or max(rows, default=0) > found.matrix_shape[0]
        ):
            raise MismatchError(
                f"{base.label} is not the base of {archive.folder}: tensor {tensor.name} has shape "
                f"{list(found.shape)} there; {give_base(archive)}."
            )


def named_tensors(manifest: Manifest, wanted: Iterable[str] | None) -> list[Tensor]:
    """The tensors of these names, each once, or all. Raises UsageError with the nearest name."""
    if wanted is None:
        return list(manifest.tensors)
    wanted = list(wanted)
    known = {tensor.name: tensor for tensor in manifest.tensors}
    for name in wanted:
        if name not in known:
            close = nearest(name, sorted(known)).partition("Known:")[0]
            raise UsageError(f"The archive has no tensor {name!r}; {close}see deltafold inspect.")
    return [known[name] for name in dict.fromkeys(wanted)]


@undisturbed
def check_base_tensor(archive: Archive, tensor: Tensor, base: Checkpoint) -> None:
    """Read the base's tensor once and compare its digest. Raises MismatchError by name."""
    if tensor.base is None:
        return
    info = base.tensors[tensor.name]
    digest = TensorDigest(info.dtype, info.shape)
    for _, rows in base.row_chunks(tensor.name, CHUNK_BYTES):
        digest.update(tensor_bytes(rows))
    if digest.identity() != tensor.base:
        raise MismatchError(
            f"{base.label} is not the base of {archive.folder}: tensor {tensor.name} differs; "
            f"{give_base(archive)}."
        )


@undisturbed
def decoded_rows(
    archive: Archive, tensor: Tensor, base: Checkpoint
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows (n, columns) in the stored dtype) of one tensor, in order, covering it.

    The caller has checked the base. Raises ArchiveError if parts are damaged or do not fit.
    """
    target = archive.by_name[tensor.same_as] if tensor.same_as else tensor
    for piece in target.pieces:
        try:
            yield from _decoded_piece(archive, target, piece, base)
        except _UNSOUND as error:
            raise _damaged(archive, target, error) from error


@undisturbed
def checked_rows(
    archive: Archive, tensor: Tensor, base: Checkpoint
) -> Iterator[tuple[int, torch.Tensor]]:
    """`decoded_rows` (n, columns) of one tensor whose base is checked before and whose bits are after.

    Raises MismatchError for a wrong base; ArchiveError for damage, and if a tensor does not come back
    with its digest.
    """
    source = archive.by_name[tensor.same_as] if tensor.same_as else tensor
    for needed in {tensor.name: tensor, source.name: source}.values():
        check_base_tensor(archive, needed, base)
    codecs = {piece.codec for piece in source.pieces}
    equal = codecs == {"skip"} and source.base == tensor.tuned  # hashed a moment ago
    if equal:
        yield from decoded_rows(archive, tensor, base)
        return
    digest = TensorDigest(tensor.dtype, tensor.shape)
    for start, rows in decoded_rows(archive, tensor, base):
        digest.update(tensor_bytes(rows))
        yield start, rows
    check_digest(archive, tensor, digest)


@undisturbed
def decoded_delta(archive: Archive, tensor: Tensor, base: Checkpoint) -> torch.Tensor:
    """Fine-tune minus base as the archive says it, fp32, before it is rounded to a stored dtype.

    A matrix (rows, columns), see `Tensor.matrix_shape`, of the rows that the base has too. The
    caller has checked the base. Raises ArchiveError if parts are damaged or do not fit.
    """
    source = archive.by_name[tensor.same_as] if tensor.same_as else tensor
    n_rows, columns = base.tensors[tensor.name].matrix_shape
    whole = torch.zeros(
        min(n_rows, tensor.matrix_shape[0]), columns, dtype=torch.float32, device="cpu"
    )
    if source.base != tensor.base:  # twins now, not so in the base
        for start, rows in decoded_rows(archive, tensor, base):
            _put_difference(whole, start, rows, tensor.name, base)
        return whole
    for piece in source.pieces:
        if piece.codec == "skip":
            continue
        try:
            if not get(piece.codec).lossy:
                for start, rows in _decoded_piece(archive, source, piece, base):
                    _put_difference(whole, start, rows, tensor.name, base)
                continue
            start, stop = source.piece_rows(piece)
            codec, parts = _codec_of(archive, piece), archive.parts(source, piece)
            key = piece_key(archive.manifest.seed, source.name, start)
            for at, delta in codec.decode(parts, piece.settings, (stop - start, columns), key):
                whole[start + at : start + at + len(delta)] = delta
        except _UNSOUND as error:
            raise _damaged(archive, source, error) from error
    return whole


def _put_difference(
    whole: torch.Tensor, start: int, rows: torch.Tensor, name: str, base: Checkpoint
) -> None:
    stop = min(len(whole), start + len(rows))
    if start < stop:
        whole[start:stop] = rows[: stop - start].float() - base.rows(name, start, stop).float()


@undisturbed
def stored_factors(
    archive: Archive, tensor: Tensor, base: Checkpoint
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(left r x o, right r x i), fp32, delta = left^T right, where the archive stores just that.

    None for a tensor that is stored in several pieces, or by a codec that has no factors.
    """
    source = archive.by_name[tensor.same_as] if tensor.same_as else tensor
    if len(source.pieces) != 1 or source.base != tensor.base:
        return None
    piece = source.pieces[0]
    if not get(piece.codec).lossy or source.matrix_shape != base.tensors[tensor.name].matrix_shape:
        return None
    key = piece_key(archive.manifest.seed, source.name, 0)
    try:
        parts = archive.parts(source, piece)
        return _codec_of(archive, piece).factors(parts, piece.settings, source.matrix_shape, key)
    except _UNSOUND as error:
        raise _damaged(archive, source, error) from error


@undisturbed
def assembled(tensor: Tensor, rows: Iterator[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The whole tensor in its shape, of `decoded_rows` or `checked_rows`, as held (`dtypes.BITS`)."""
    whole = torch.empty(tensor.matrix_shape, dtype=DTYPES[tensor.dtype], device="cpu")
    for start, part in rows:
        whole[start : start + len(part)] = part
    return whole.reshape(held_shape(tensor.dtype, tensor.shape))


def check_digest(archive: Archive, tensor: Tensor, digest: TensorDigest) -> None:
    """Compare what a tensor was decoded to with what the archive says. Raises ArchiveError.

    Archives of format version 1 say it only of what is stored exactly.
    """
    source = archive.by_name[tensor.same_as] if tensor.same_as else tensor
    if not source.lossy and digest.identity() != tensor.tuned:
        raise ArchiveError(
            f"Tensor {tensor.name} of {archive.folder} does not come back as it was, though it is "
            "stored exactly; fetch the archive again."
        )
    if source.restored is not None and digest.checksum() != source.restored:
        raise ArchiveError(
            f"Tensor {tensor.name} of {archive.folder} decodes to other values here than where the "
            "archive was made, though its parts are whole; run deltafold verify with --base in a "
            "fresh process, and install another version of torch if that says the same."
        )


def _decoded_piece(
    archive: Archive, tensor: Tensor, piece: Piece, base: Checkpoint
) -> Iterator[tuple[int, torch.Tensor]]:
    start, stop = tensor.piece_rows(piece)
    dtype, columns = DTYPES[tensor.dtype], tensor.matrix_shape[1]
    if piece.codec == "skip":
        step = max(1, CHUNK_BYTES // max(1, columns * dtype.itemsize))
        for at in range(start, stop, step):
            yield at, reference_rows(base, tensor.name, at, min(stop, at + step), dtype)
        return
    parts = archive.parts(tensor, piece)
    if not get(piece.codec).lossy:
        reference = (
            reference_rows(base, tensor.name, start, stop, dtype)
            if piece.reference == "base"
            else torch.zeros(stop - start, columns, dtype=dtype, device="cpu")
        )
        yield start, exact_codec(piece.codec).decode(parts, piece.settings, reference)
        return
    codec = _codec_of(archive, piece)
    key = piece_key(archive.manifest.seed, tensor.name, start)
    for at, delta in codec.decode(parts, piece.settings, (stop - start, columns), key):
        first = start + at
        reference = base.rows(tensor.name, first, first + len(delta)).float()
        yield first, rounded_sum(reference, delta, dtype)


def _codec_of(archive: Archive, piece: Piece) -> DeltaCodec:
    return _codec(piece.codec, tuple(archive.manifest.codecs[piece.codec].config.items()))


@cache
def _codec(name: str, config: tuple[tuple[str, int | float | str], ...]) -> DeltaCodec:
    return delta_codec(name, dict(config))


def piece_key(seed: int, tensor: str, start: int) -> int:
    return derive_key(seed, tensor, str(start))


def reference_rows(
    pair_base: Checkpoint, name: str, start: int, stop: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows (stop - start, columns) of the base in the fine-tune's dtype: what exact codecs refer to."""
    return pair_base.rows(name, start, stop).to(dtype)
