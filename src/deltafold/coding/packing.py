"""Bits to bytes: fixed-width packing, and Elias-Fano for ascending positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_CHUNK = 1 << 16  # values handled at once: stays in the cache; a multiple of 8, hence whole bytes


def pack(values: NDArray[np.integer], width: int) -> Bytes:
    """Pack non-negative integers below 2^width, most significant bit first, back to back.

    Returns ceil(n * width / 8) bytes.

    >>> pack(np.array([1, 2, 3]), 2).tolist()        # 01 10 11 00
    [108]
    """
    count = len(values)
    packed = np.zeros(packed_bytes(count, width), dtype=np.uint8)
    for start in range(0, count if width else 0, _CHUNK):
        chunk = values[start : start + _CHUNK]
        piece = _pack_narrow(chunk, width) if width <= 8 else _pack_wide(chunk, width)
        at = start * width // 8
        packed[at : at + len(piece)] = piece
    return packed


def unpack(packed: Bytes, width: int, count: int) -> NDArray[np.uint64]:
    """Inverse of `pack` for `count` values. Raises ValueError if the length does not fit."""
    if 0 < width <= 8:
        return unpack_u8(packed, width, count).astype(np.uint64)
    _check_length(packed, width, count)
    out = np.zeros(count, dtype=np.uint64)
    for start in range(0, count if width else 0, _CHUNK):
        stop = min(count, start + _CHUNK)
        raw = packed[start * width // 8 : packed_bytes(stop, width)]
        bits = np.unpackbits(raw, count=(stop - start) * width).reshape(-1, width)
        for column in range(width):
            out[start:stop] = (out[start:stop] << np.uint64(1)) | bits[:, column]
    return out


def unpack_u8(packed: Bytes, width: int, count: int) -> NDArray[np.uint8]:
    """Inverse of `pack` for `count` values of 1 to 8 bits, as bytes: the fast path.

    Raises ValueError if the length does not fit.
    """
    if not 1 <= width <= 8:
        raise ValueError(f"values of {width} bits do not come as bytes")
    _check_length(packed, width, count)
    out = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        raw = packed[start * width // 8 : packed_bytes(stop, width)]
        out[start:stop] = _unpack_narrow(raw, width, stop - start)
    return out


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `pack` gives."""
    return -(-count * width // 8)


def _check_length(packed: Bytes, width: int, count: int) -> None:
    if width and len(packed) != packed_bytes(count, width):
        raise ValueError(f"{len(packed)} bytes cannot hold {count} values of {width} bits")


def _pack_wide(values: NDArray[np.integer], width: int) -> Bytes:
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint64)
    bits = (values.astype(np.uint64)[:, None] >> shifts) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8))


def _pack_narrow(values: NDArray[np.integer], width: int) -> Bytes:
    """Up to 8 bits: eight values stand in one 64-bit word and move together in three steps.

    Width 3, each letter one value of 3 bits:  .a.b.c.d.e.f.g.h -> ..ab..cd..ef..gh -> .. -> abcdefgh
    """
    count = len(values)
    lanes = np.zeros(-(-count // 8) * 8, dtype=np.uint8)
    np.bitwise_and(values.astype(np.uint8, copy=False), (1 << width) - 1, out=lanes[:count])
    if width == 8:
        return lanes[:count]
    if width == 1:
        return np.packbits(lanes[:count])
    words = lanes.view(">u8").astype(np.uint64)
    for lane in (8, 16, 32):
        bits = lane * width // 8
        low = _repeated(bits, 2 * lane)
        high = (words >> np.uint64(lane - bits)) & (low << np.uint64(bits))
        words &= low
        words |= high
    words <<= np.uint64(64 - 8 * width)
    octets = words.astype(">u8").view(np.uint8).reshape(-1, 8)
    return octets[:, :width].reshape(-1)[: packed_bytes(count, width)]


def _unpack_narrow(packed: Bytes, width: int, count: int) -> NDArray[np.uint8]:
    """The three steps of `_pack_narrow` backwards."""
    if width == 8:
        return packed
    if width == 1:
        return np.unpackbits(packed, count=count)
    groups = -(-count // 8)
    padded = np.zeros(groups * width + 8, dtype=np.uint8)
    padded[: len(packed)] = packed
    # One word from each group of `width` bytes; the bytes of the next group that it also reads go.
    words = np.ndarray((groups,), ">u8", padded, 0, (width,)).astype(np.uint64)
    words >>= np.uint64(64 - 8 * width)
    for lane in (32, 16, 8):
        bits = lane * width // 8
        low = _repeated(bits, 2 * lane)
        high = (words & (low << np.uint64(bits))) << np.uint64(lane - bits)
        words &= low
        words |= high
    return words.astype(">u8").view(np.uint8)[:count]


def _repeated(bits: int, period: int) -> np.uint64:
    """A word whose lowest `bits` bits of each `period` are ones."""
    return np.uint64(sum(((1 << bits) - 1) << at for at in range(0, 64, period)))


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
