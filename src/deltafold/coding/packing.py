"""Bits to bytes: fixed-width packing, and Elias-Fano for ascending positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_CHUNK = 1 << 20  # values packed at once; a multiple of 8, so that chunks end on whole bytes


def pack(values: NDArray[np.integer], width: int) -> Bytes:
    """Pack non-negative integers below 2^width, most significant bit first, back to back.

    Returns ceil(n * width / 8) bytes.

    >>> pack(np.array([1, 2, 3]), 2).tolist()        # 01 10 11 00
    [108]
    """
    if width == 0 or not len(values):
        return np.zeros(0, dtype=np.uint8)
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint64)
    packed = []
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].astype(np.uint64)
        bits = ((chunk[:, None] >> shifts) & np.uint64(1)).astype(np.uint8)
        packed.append(np.packbits(bits))
    return np.concatenate(packed)


def unpack(packed: Bytes, width: int, count: int) -> NDArray[np.uint64]:
    """Inverse of `pack` for `count` values."""
    out = np.zeros(count, dtype=np.uint64)
    if width == 0:
        return out
    if len(packed) != packed_bytes(count, width):
        raise ValueError(f"{len(packed)} bytes cannot hold {count} values of {width} bits")
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        raw = packed[start * width // 8 : -(-stop * width // 8)]
        bits = np.unpackbits(raw, count=(stop - start) * width).reshape(-1, width)
        for column in range(width):
            out[start:stop] = (out[start:stop] << np.uint64(1)) | bits[:, column]
    return out


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `pack` gives."""
    return -(-count * width // 8)


@dataclass(frozen=True)
class EliasFano:
    """Ascending distinct positions in [0, universe), in about 2 + log2(universe / count) bits each.

    Elias (1974), Fano (1971). Each position splits into `low_bits` low bits, packed as they are,
    and the rest, written in unary as the gaps between ones of a bit vector:

        positions  2  5  13  (universe 16, low_bits 2)
        low        10 01 01
        high       0, 1, 3  ->  1 01 001        one per position, zeros count up
    """

    count: int
    universe: int

    @property
    def low_bits(self) -> int:
        """Largest w with count * 2^w <= universe."""
        return max(0, (self.universe // self.count).bit_length() - 1) if self.count else 0

    @property
    def low_bytes(self) -> int:
        return packed_bytes(self.count, self.low_bits)

    @property
    def high_bytes(self) -> int:
        if not self.count:
            return 0
        return packed_bytes(self.count + (self.universe >> self.low_bits) + 1, 1)

    def encode(self, positions: NDArray[np.int64]) -> tuple[Bytes, Bytes]:
        """(low, high) of `count` ascending positions."""
        low = positions & ((1 << self.low_bits) - 1)
        ones = (positions >> self.low_bits) + np.arange(self.count)
        bits = np.zeros(self.high_bytes * 8, dtype=np.uint8)
        bits[ones] = 1
        return pack(low, self.low_bits), np.packbits(bits)

    def decode(self, low: Bytes, high: Bytes) -> NDArray[np.int64]:
        """Positions from (low, high). Raises ValueError if the parts do not fit."""
        ones = np.flatnonzero(np.unpackbits(high))
        if len(ones) != self.count or len(high) != self.high_bytes:
            raise ValueError(f"{len(ones)} positions found where {self.count} were promised")
        upper = (ones - np.arange(self.count)).astype(np.int64)
        lower = unpack(low, self.low_bits, self.count).astype(np.int64)
        positions = (upper << self.low_bits) | lower
        if self.count and (int(positions[-1]) >= self.universe or np.any(np.diff(positions) <= 0)):
            raise ValueError("positions do not ascend inside the tensor")
        return positions
