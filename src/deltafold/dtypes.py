"""Dtypes by the names that safetensors gives them: their sizes, and torch's own, without importing it."""

from __future__ import annotations

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
_NAMES = {f"torch.{ours}": name for name, ours in _TORCH_NAMES.items()}

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one value."""

FLOATING = frozenset(name for name in ITEM_BYTES if name.startswith(("F", "BF")))
"""Those of floats."""


class _Dtypes(Mapping[str, "torch.dtype"]):
    def __getitem__(self, name: str) -> torch.dtype:
        return getattr(torch, _TORCH_NAMES[name])

    def __contains__(self, name: object) -> bool:
        return name in _TORCH_NAMES

    def __iter__(self) -> Iterator[str]:
        return iter(_TORCH_NAMES)

    def __len__(self) -> int:
        return len(_TORCH_NAMES)


class _DtypeNames(Mapping["torch.dtype", str]):
    def __getitem__(self, dtype: torch.dtype) -> str:
        return _NAMES[str(dtype)]

    def __iter__(self) -> Iterator[torch.dtype]:
        return iter(DTYPES.values())

    def __len__(self) -> int:
        return len(_NAMES)


DTYPES = _Dtypes()
"""torch's dtype of each name."""

DTYPE_NAMES = _DtypeNames()
"""The name of each of torch's dtypes that safetensors knows."""
