"""Integers of any size as tokens of a small alphabet, and the bits that a token leaves open.

Integers below 16 are tokens themselves. Above, an octave [2^e, 2^(e+1)) is cut into `2^fine` equal
parts, a token each; which value of its part it is are `e - fine` bits, about uniform:

    value   0 .. 15   16 17   18 19   20 21  ..  28 .. 31   32 .. 35  ...      (fine = 3)
    token   0 .. 15   16      17      18     ..  22, 23     24        ...

Own arrangement of Elias's (1975) gamma code, for an entropy coder behind it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint8]
DIRECT = 16
_OCTAVE = 4  # the first octave above the direct ones


def token_count(most: int, fine: int) -> int:
    """How many tokens integers up to `most` need."""
    if most < DIRECT:
        return most + 1
    octave = most.bit_length() - 1
    return (
        DIRECT + ((octave - _OCTAVE) << fine) + ((most >> (octave - fine)) & ((1 << fine) - 1)) + 1
    )


def first_value(token: int, fine: int) -> int:
    """The smallest integer of a token.

    >>> [first_value(t, 3) for t in (15, 16, 17, 24)]
    [15, 16, 18, 32]
    """
    if token < DIRECT:
        return token
    octave, part = divmod(token - DIRECT, 1 << fine)
    return ((1 << fine) + part) << (octave + _OCTAVE - fine)


def open_bits(token: int, fine: int) -> int:
    """How many bits a token leaves open."""
    return 0 if token < DIRECT else (token - DIRECT >> fine) + _OCTAVE - fine


def to_tokens(values: NDArray[np.unsignedinteger], fine: int) -> Tokens:
    """The token of each of `values` (n,), unsigned. At most 2^(64 - 60 * 2^fine / 256) of them fit a byte."""
    tokens = values.astype(np.uint8)
    large = np.flatnonzero(values >= DIRECT)
    if len(large):
        wide = values[large].astype(np.uint64)
        octave = _octaves(wide)
        part = (wide >> (octave - fine).astype(np.uint64)) & np.uint64((1 << fine) - 1)
        tokens[large] = DIRECT + ((octave - _OCTAVE) << fine) + part.astype(np.int64)
    return tokens


def rests(values: NDArray[np.unsignedinteger], token: int, fine: int) -> NDArray[np.uint64]:
    """What `token` leaves open of `values` (n,), all of which it stands for."""
    return values.astype(np.uint64) - np.uint64(first_value(token, fine))


def _octaves(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """floor(log2) of positive integers; halves, because floats hold 53 bits."""
    high = values >> np.uint64(32)
    top = np.where(high > 0, high, values & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return np.frexp(top)[1].astype(np.int64) - 1 + np.where(high > 0, 32, 0)
