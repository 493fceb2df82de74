"""Dtypes by the names that safetensors gives them: their sizes, and torch's own, without importing it.

Newer dtypes are **bits** here: nothing computes with them, so they are held as integers of their
width (those of less than a byte as the bytes they lie in), and only exact codecs store them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from deltafold.lazy import torch

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_AS_BITS = {
    "F8_E8M0": ("uint8", "float8_e8m0fnu"),
    "F8_E4M3FNUZ": ("uint8", "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": ("uint8", "float8_e5m2fnuz"),
    "C64": ("int64", "complex64"),
    "F4": ("uint8", "float4_e2m1fn_x2"),
    "F6_E2M3": ("uint8", ""),
    "F6_E3M2": ("uint8", ""),
}
"""What they are held as, and what newer versions of torch call them."""
_VALUE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_NAMES = {f"torch.{ours}": name for name, ours in _TORCH_NAMES.items()}

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8, "F4": 1, "F6_E2M3": 1, "F6_E3M2": 1,
}  # fmt: skip
"""Bytes of one value as it is held: of F4 and F6, a byte of several values."""

BITS = frozenset(_AS_BITS)
"""Those that are stored exactly, bit for bit, and never computed with."""

FLOATING = frozenset(n for n in ITEM_BYTES if n.startswith(("F", "BF"))) - BITS
"""Those of floats that are computed with."""


def held_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor in memory: values of less than a byte are seen as the bytes of each row.

    Where rows end inside a byte, as all bytes in one row. Raises ValueError if the last byte is not
    full, as safetensors does.

    >>> held_shape("F4", (8, 64)), held_shape("F4", (8, 3)), held_shape("BF16", (8, 3))
    ((8, 32), (12,), (8, 3))
    """
    bits = _VALUE_BITS.get(dtype)
    if bits is None:
        return shape
    if math.prod(shape) * bits % 8:
        raise ValueError("its values do not fill whole bytes")
    if shape and shape[-1] * bits % 8 == 0:
        return (*shape[:-1], shape[-1] * bits // 8)
    return (math.prod(shape) * bits // 8,)


def matrix_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor seen as rows x columns of what it is held as: leading dimensions folded, a vector is one row.

    >>> matrix_shape("F32", (3, 4, 5)), matrix_shape("F32", ())
    ((12, 5), (1, 1))
    """
    return folded(held_shape(dtype, shape))


def folded(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows x columns of a shape: leading dimensions folded, a vector or a number is one row."""
    return (1, math.prod(shape)) if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file. Raises ValueError if its last byte is not full."""
    return math.prod(held_shape(dtype, shape)) * ITEM_BYTES[dtype]


def native(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A tensor as it is held, of any shape, in torch's own dtype where it has one."""
    own = getattr(torch, _AS_BITS[dtype][1], None) if dtype in BITS else None
    return tensor if own is None else tensor.view(own)


class _Dtypes(Mapping[str, "torch.dtype"]):
    def __getitem__(self, name: str) -> torch.dtype:
        return getattr(torch, _AS_BITS[name][0] if name in BITS else _TORCH_NAMES[name])

    def __contains__(self, name: object) -> bool:
        return name in ITEM_BYTES

    def __iter__(self) -> Iterator[str]:
        return iter(ITEM_BYTES)

    def __len__(self) -> int:
        return len(ITEM_BYTES)


class _DtypeNames(Mapping["torch.dtype", str]):
    def __getitem__(self, dtype: torch.dtype) -> str:
        return _NAMES[str(dtype)]

    def __iter__(self) -> Iterator[torch.dtype]:
        return (DTYPES[name] for name in _TORCH_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


DTYPES = _Dtypes()
"""torch's dtype that each is held in."""

DTYPE_NAMES = _DtypeNames()
"""The name of each of torch's dtypes that safetensors knows."""
