"""The header of a safetensors file, read without mapping or loading the file.

    | 8 bytes: length n, little endian | n bytes of JSON | payload, tensors back to back |

The safetensors library maps the whole file; pages of a mapped checkpoint count as resident memory,
so that a pass over 16 GB looks like (and under a limit is) 16 GB. We need names, shapes, dtypes and
offsets, then plain reads of rows; that is this file. Malformed headers are refused, never guessed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.dtypes import ITEM_BYTES, matrix_shape, stored_bytes
from deltafold.errors import CheckpointError
from deltafold.foreign import unread

MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors format


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `start_bytes` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def n_bytes(self) -> int:
        return stored_bytes(self.dtype, self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The tensor seen as rows x columns, see `dtypes.matrix_shape`."""
        return matrix_shape(self.dtype, self.shape)


def _refuse(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file ({why}); copy or download it again."
    )


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read names, shapes, dtypes and offsets of a safetensors file, in file order.

    Returns (tensors by name, metadata). Raises CheckpointError on a missing, truncated or
    malformed file.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = int.from_bytes(file.read(8), "little")
            if size_bytes < 8 or length_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise _refuse(path, "its header is cut off")
            raw = file.read(length_bytes)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; copy it there, or download the checkpoint again."
        ) from None
    except OSError as error:
        raise unread(error, path, CheckpointError) from None
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("a value of its metadata is no text")
        tensors = {
            name: _tensor_info(name, entry, path, 8 + length_bytes)
            for name, entry in header.items()
        }
    except KeyError as error:
        raise _refuse(path, f"its header lacks the field {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _refuse(path, f"its header cannot be read: {error}") from None
    _check_layout(path, tensors, 8 + length_bytes, size_bytes)
    # Empty tensors begin where the next one does; those of one place stay as the header has them.
    ordered = sorted(tensors.values(), key=lambda info: (info.start_bytes, info.n_bytes))
    return {info.name: info for info in ordered}, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is listed twice")
    return found


def _tensor_info(name: str, entry: dict[str, Any], path: Path, origin_bytes: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"Tensor {name} of {path} has the dtype {dtype}, which this deltafold does not know; "
            "upgrade deltafold, or save the tensor in an older dtype of safetensors."
        )
    # `type`, not `isinstance`: True is no length.
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError(f"shape or offsets of tensor {name} are not whole numbers from 0 up")
    info = TensorInfo(name, dtype, shape, path, origin_bytes + start)
    if end - start != info.n_bytes:
        raise ValueError(f"the size of tensor {name} does not fit its shape")
    return info


def _check_layout(
    path: Path, tensors: dict[str, TensorInfo], origin_bytes: int, size_bytes: int
) -> None:
    """Tensors must lie back to back and end where the file ends."""
    position = origin_bytes
    for info in sorted(tensors.values(), key=lambda t: (t.start_bytes, t.n_bytes)):
        if info.start_bytes != position:
            raise _refuse(path, f"tensor {info.name} does not start where the one before ends")
        position += info.n_bytes
    if position > size_bytes:
        raise _refuse(path, f"{position - size_bytes:,} bytes are missing at its end")
    if position < size_bytes:
        raise _refuse(path, f"{size_bytes - position:,} bytes too many at its end")


def build_header(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """Header bytes for (name, dtype, shape) in this order, and each tensor's start in the file."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    starts: dict[str, int] = {}
    for name, dtype, shape in tensors:
        n_bytes = stored_bytes(dtype, shape)
        offsets = [position, position + n_bytes]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        starts[name] = position
        position += n_bytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    origin = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {n: s + origin for n, s in starts.items()}
