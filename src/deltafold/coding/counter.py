"""A counter-based generator: random integers as a fixed function of (key, index).

Seeded positions are not stored in an archive; decoding derives them again. That needs integers that
never change: not with the library, the machine, the number of threads or the order of work. So the
generator is these few lines of 64-bit arithmetic (the finaliser of SplitMix64, Steele et al. 2014),
part of the archive format and pinned by a test vector in `docs/format.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

GENERATOR_VERSION = 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_CHUNK = 1 << 16  # keeps the working set in the processor's cache


def derive_key(seed: int, name: str, stream: str = "") -> int:
    """64-bit key of one tensor's random stream, from the run's seed and the tensor's name.

    >>> hex(derive_key(0, "model.layers.0.mlp.up_proj.weight", "u"))
    '0x16a63fe1e0ae9871'
    """
    text = f"deltafold/{GENERATOR_VERSION}/{seed}/{name}/{stream}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def random_u64(key: int, start: int, stop: int) -> NDArray[np.uint64]:
    """Random 64-bit integers number `start` to `stop` of the stream `key`."""
    return _finalise(np.arange(start + 1, stop + 1, dtype=np.uint64), key)


def _finalise(z: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """SplitMix64 of the stream `key` at the counters z (from 1), in place."""
    z *= _GOLDEN
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= _MIX_1
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z


def shuffled(key: int, count: int) -> NDArray[np.intp]:
    """The numbers 0 to `count` - 1 in an order drawn by the stream `key`."""
    return np.argsort(random_u64(key, 0, count), kind="stable")


def random_u32(key: int, start: int, stop: int) -> NDArray[np.uint32]:
    """The upper halves of `random_u64`."""
    return (random_u64(key, start, stop) >> np.uint64(32)).astype(np.uint32)


def gaussian(key: int, rows: int, columns: int) -> NDArray[np.float64]:
    """A rows x columns matrix of standard normal numbers (Box-Muller on the stream's integers)."""
    n = rows * columns
    half = (n + 1) // 2
    bits = random_u64(key, 0, 2 * half) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[:half]))
    angle = 2.0 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n].reshape(
        rows, columns
    )


def select_threshold(
    chunks: Callable[[], Iterator[NDArray[np.uint32]]], keep: int
) -> tuple[int, int]:
    """Threshold t so that `keep` of the 32-bit keys lie below it; (t, number below).

    Keys that tie at the threshold are all left out or all taken, whichever is nearer to `keep`, so
    the count can be off by a tie (one in 2^32 keys for random keys). Two passes over the keys and
    two histograms of 65,536 bins: memory does not grow with the number of keys.
    """
    if keep <= 0:
        return 0, 0
    high = np.zeros(1 << 16, dtype=np.int64)
    for chunk in chunks():
        high += np.bincount(chunk >> np.uint32(16), minlength=1 << 16)
    if keep >= (total := int(high.sum())):
        return 1 << 32, total
    cumulative = np.cumsum(high)
    bin_ = int(np.searchsorted(cumulative, keep))
    below = int(cumulative[bin_ - 1]) if bin_ else 0
    low = np.zeros(1 << 16, dtype=np.int64)
    for chunk in chunks():
        inside = chunk[(chunk >> np.uint32(16)) == bin_]
        low += np.bincount(inside & np.uint32(0xFFFF), minlength=1 << 16)
    inner = below + np.cumsum(low)
    last = int(np.searchsorted(inner, keep))
    before = int(inner[last - 1]) if last else below
    if keep - before < int(inner[last]) - keep:
        return (bin_ << 16) + last, before
    return (bin_ << 16) + last + 1, int(inner[last])


def draw(key: int, total: int, keep: int) -> tuple[int, NDArray[np.int64]]:
    """The `keep` positions of [0, total) with the smallest 32-bit keys, as (threshold, positions).

    The positions are those whose key lies below the threshold, ascending; ties at the threshold are
    all left out or all taken, as in `select_threshold`. One pass: positions under a threshold that
    is surely high enough are collected, then cut to the number wanted.
    """
    if keep <= 0:
        return 0, np.zeros(0, dtype=np.int64)
    if keep >= total:
        return 1 << 32, np.arange(total, dtype=np.int64)
    enough = min(1 << 32, int((keep + 8 * keep**0.5 + 32) / total * 2**32) + 1)
    positions = kept_positions(key, 0, total, enough)
    if len(positions) < keep:  # eight standard deviations off: does not happen, but would be wrong
        enough, positions = 1 << 32, np.arange(total, dtype=np.int64)
    keys = keys_at(key, positions)
    threshold, _ = select_threshold(lambda: iter([keys]), keep)
    return threshold, positions[keys.astype(np.uint64) < np.uint64(threshold)]


def keys_at(key: int, positions: NDArray[np.int64]) -> NDArray[np.uint32]:
    """32-bit keys of given positions of a stream."""
    z = positions.astype(np.uint64) + np.uint64(1)
    return (_finalise(z, key) >> np.uint64(32)).astype(np.uint32)


def kept_positions(key: int, start: int, stop: int, threshold: int) -> NDArray[np.int64]:
    """Positions in [start, stop) whose key lies below `threshold`, ascending."""
    found = []
    for begin in range(start, stop, _CHUNK):
        keys = random_u32(key, begin, min(stop, begin + _CHUNK))
        found.append(np.flatnonzero(keys.astype(np.uint64) < np.uint64(threshold)) + begin)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def subset(key: int, column: int, size: int, keep: int) -> NDArray[np.int64]:
    """Exactly `keep` of `size` positions, ascending: those with the smallest keys of this column.

    Column c owns the keys c * size to (c + 1) * size of the stream; ties go to the lower position.
    """
    if keep >= size:
        return np.arange(size, dtype=np.int64)
    if keep <= 0:
        return np.zeros(0, dtype=np.int64)
    keys = random_u32(key, column * size, (column + 1) * size).astype(np.uint64)
    keys = (keys << np.uint64(32)) | np.arange(size, dtype=np.uint64)
    chosen = np.partition(keys, keep - 1)[:keep] & np.uint64(0xFFFFFFFF)
    return np.sort(chosen.astype(np.int64))
