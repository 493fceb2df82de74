"""Digests: SHA-256, shortened. 128 bits name a tensor, 64 bits guard a part against flipped bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


class TensorDigest:
    """Running digest of a tensor: dtype, shape, then its bytes in order."""

    def __init__(self, dtype: str, shape: Iterable[int]):
        self._hash = hashlib.sha256(f"{dtype}{list(shape)}".encode())

    def update(self, data: memoryview) -> None:
        self._hash.update(data)

    def identity(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]

    def checksum(self) -> str:
        """16 hexadecimal digits."""
        return self._hash.hexdigest()[:16]


def file_digest(data: bytes) -> str:
    """Identity of a small file."""
    return hashlib.sha256(data).hexdigest()[:32]
