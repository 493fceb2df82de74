"""A reader of archives written from `docs/format.md` alone: numpy, json, struct, zstandard.

It imports nothing of deltafold. `test_docs.py` lets it restore archives of every codec and compares
with what `deltafold restore` gives: if the page and the program part ways, that test fails.
It reads whole tensors, and checks every digest; it is written to be read, not to be fast.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

BITS = {"F64": "<u8", "I64": "<u8", "U64": "<u8", "F32": "<u4", "I32": "<u4", "U32": "<u4"}
BITS |= {
    "F16": "<u2",
    "BF16": "<u2",
    "I16": "<u2",
    "U16": "<u2",
    "I8": "u1",
    "U8": "u1",
    "BOOL": "u1",
}
BITS |= {"F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1"}
BITS |= {"F8_E5M2FNUZ": "u1", "C64": "<u8", "F4": "u1", "F6_E2M3": "u1", "F6_E3M2": "u1"}
SMALL = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # bits of a value, where a byte holds several
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
LARGEST = {"F16": 65504.0, "BF16": (2 - 2**-7) * 2.0**127}
LARGEST |= {"F32": (2 - 2**-23) * 2.0**127, "F64": (2 - 2**-23) * 2.0**127}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it. `bits`: flat unsigned integers, one an element."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def bits(self) -> np.ndarray:
        return np.frombuffer(self.data, dtype=BITS[self.dtype])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        bits, shape = SMALL.get(self.dtype, 8), self.shape
        if bits < 8 and (not shape or shape[-1] * bits % 8):
            return 1, math.prod(shape) * bits // 8
        columns = (shape[-1] if shape else 1) * bits // 8
        return math.prod(shape[:-1]), columns

    @property
    def columns(self) -> int:
        return self.matrix_shape[1]

    def matrix(self) -> np.ndarray:
        """Bits as rows x columns."""
        return self.bits.reshape(self.matrix_shape)


Parts = dict[str, Stored]
Shape = tuple[int, int]


def digest(stored: Stored, digits: int) -> str:
    text = f"{stored.dtype}[{', '.join(str(size) for size in stored.shape)}]"
    return hashlib.sha256(text.encode() + stored.data).hexdigest()[:digits]


def read_safetensors(file: Path) -> Parts:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Stored(entry["dtype"], tuple(entry["shape"]), raw[start:stop])
    return found


def read_folder(folder: Path) -> Parts:
    """All tensors; before the names of those in a folder inside stand its name and a slash."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.relative_to(folder).as_posix().removesuffix(file.name)
        found |= {place + name: tensor for name, tensor in read_safetensors(file).items()}
    return found


# Numbers


def to_fp32(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)


def from_fp32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # round to nearest, ties to even
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return np.ascontiguousarray(values.astype(kind)).view(BITS[dtype])


def order(bits: np.ndarray) -> np.ndarray:
    width = bits.dtype.itemsize * 8
    low = bits.dtype.type((1 << (width - 1)) - 1)
    return np.where(bits >> bits.dtype.type(width - 1), bits ^ low, bits)


def undo_difference(z: np.ndarray, reference: np.ndarray, dtype: str) -> np.ndarray:
    one = z.dtype.type(1)
    d = np.where(z & one, ~(z >> one), z >> one)
    if dtype not in FLOATS:
        return reference + d
    return order(order(reference) + d)


# Bits


def inflate(part: Stored) -> bytes:
    return zstandard.ZstdDecompressor().decompress(part.data) if part.data else b""


def planes(parts: Parts, itemsize: int) -> np.ndarray:
    bytes_ = [np.frombuffer(inflate(parts[f"plane{p}"]), np.uint8) for p in range(itemsize)]
    return np.ascontiguousarray(np.stack(bytes_, axis=1)).view(f"<u{itemsize}").reshape(-1)


def elias_fano(low: bytes, high: bytes, count: int, universe: int) -> np.ndarray:
    if count == 0:
        return np.zeros(0, np.int64)
    width = 0
    while count << (width + 1) <= universe:
        width += 1
    lows = np.unpackbits(np.frombuffer(low, np.uint8))[: count * width].reshape(count, width)
    lower = lows.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(high, np.uint8)))
    return ((ones - np.arange(count)) << width) | lower


def unpack(packed: bytes, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))[: count * width].reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1))


def run(packed: bytes, scales: np.ndarray, width: int, count: int, unit: float) -> np.ndarray:
    """Values of one run of codes; `scales` in fp32, those of the run alone."""
    level = (unpack(packed, width, count) - (2**width - 1) / 2).astype(np.float32)
    return level * np.repeat(scales * np.float32(unit), 128)[:count]


# Randomness


def derive_key(seed: int, tensor: str, first_row: int) -> int:
    text = f"deltafold/1/{seed}/{tensor}/{first_row}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def random_u64(key: int, start: int, stop: int) -> np.ndarray:
    """Numbers `start` to `stop`; numpy's unsigned arrays wrap around by themselves."""
    z = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = z + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def below_threshold(key: int, total: int, threshold: int) -> np.ndarray:
    return np.flatnonzero(random_u64(key, 0, total) >> np.uint64(32) < np.uint64(threshold))


def subset(key: int, column: int, size: int, keep: int) -> np.ndarray:
    keys = random_u64(key, column * size, (column + 1) * size) >> np.uint64(32)
    return np.sort(np.argsort(keys, kind="stable")[:keep])


# Codecs: the approximated delta, fp32


def lowrank(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    u, v = factor(parts["u"]), factor(parts["v"])
    s = to_fp32(parts["s"].matrix().reshape(-1, 1), "F32")
    return in_order(u * s, v)


def in_order(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left^T right: products and sums in fp64, term after term; rounded once."""
    total = np.zeros((left.shape[1], right.shape[1]))
    for x, y in zip(left.astype(np.float64), right.astype(np.float64), strict=True):
        total += x[:, None] * y
    return total.astype(np.float32)


def factor(part: Stored) -> np.ndarray:
    return to_fp32(part.matrix(), part.dtype)


def impart(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    kept = parts["kept"].bits.view("<i4").reshape(2, -1)
    u = spread(factor(parts["u"])[0], kept[0], shape[0], key ^ 0x75)
    v = spread(factor(parts["v"])[0], kept[1], shape[1], key ^ 0x76)
    s = to_fp32(parts["s"].matrix().reshape(-1, 1), "F32")
    return in_order(u * s, v)


def spread(values: np.ndarray, kept: np.ndarray, size: int, key: int) -> np.ndarray:
    out, used = np.zeros((len(kept), size), np.float32), 0
    for j, keep in enumerate(kept.tolist()):
        at = subset(key, j, size, keep)
        out[j, at] = values[used : used + keep] * np.float32(size / max(1, keep))
        used += keep
    return out


def runs(parts: Parts, wanted: list[tuple[int, int]]) -> list[np.ndarray]:
    """Values of runs that follow one another: (count, width) of each."""
    codes, scales, found = parts["codes"].data, factor(parts["scales"])[0], []
    for count, width in wanted:
        n_bytes, n_scales = -(-count * width // 8), -(-count // 128)
        found.append(run(codes[:n_bytes], scales[:n_scales], width, count, 2.0**-10))
        codes, scales = codes[n_bytes:], scales[n_scales:]
    assert len(codes) == 0 and len(scales) == 0
    return found


def product(u: list[np.ndarray], v: list[np.ndarray], s: Stored) -> np.ndarray:
    return in_order(np.concatenate(u) * to_fp32(s.bits, "BF16")[:, None], np.concatenate(v))


def svd_quant(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    return banded(parts, [(settings["rank"], settings["bits"])], shape)


def delta_come(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    return banded(parts, [(settings[f"at{width}"], width) for width in (8, 3, 2)], shape)


def banded(parts: Parts, bands: list[tuple[int, int]], shape: Shape) -> np.ndarray:
    wanted = [(n * size, width) for n, width in bands for size in (shape[1], shape[0])]
    found = runs(parts, wanted)
    v = [values.reshape(-1, shape[1]) for values in found[0::2]]
    u = [values.reshape(-1, shape[0]) for values in found[1::2]]
    return product(u, v, parts["s"])


def impart_qt(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    s = to_fp32(parts["s"].bits, "BF16").astype(np.float64)
    x = s / s[0] if len(s) else s
    n, y = round(settings["c"] * 65536), np.ones(len(s))
    for _ in range(n // 65536):
        y = y * x
    for bit in f"{n % 65536:016b}":
        x = np.sqrt(x)
        y = y * x if bit == "1" else y
    p = (1 - y) * settings["gamma"]
    kept = [size - np.floor(size * p).astype(np.int64) for size in shape]
    bands = [b for b in ((0, 2, 8), (2, 34, 3), (34, len(s), 2)) if b[0] < len(s)]
    wanted = [(int(kept[side][a:b].sum()), width) for a, b, width in bands for side in (1, 0)]
    found = runs(parts, wanted)
    v = np.concatenate([np.zeros(0, np.float32), *found[0::2]])
    u = np.concatenate([np.zeros(0, np.float32), *found[1::2]])
    return product(
        [spread(u, kept[0], shape[0], key ^ 0x75)],
        [spread(v, kept[1], shape[1], key ^ 0x76)],
        parts["s"],
    )


def dare_qt(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    total, kept = shape[0] * shape[1], settings["kept"]
    out, scales = np.zeros(total, np.float32), factor(parts["scales"])[0]
    unit = 2.0 ** int(settings["unit"])
    values = run(parts["codes"].data, scales, settings["bits"], kept, unit)
    at = below_threshold(key, total, int(settings["threshold"], 16))
    out[at] = values * np.float32(total / max(1, kept))
    return out.reshape(shape)


def bitdelta(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    total, kept = shape[0] * shape[1], settings["kept"]
    out = np.zeros(total, np.float32)
    at = below_threshold(key, total, int(settings["threshold"], 16))
    scale = to_fp32(parts["scale"].bits, "F32") * np.float32(total / max(1, kept))
    out[at] = np.where(unpack(parts["signs"].data, 1, kept) == 1, scale, -scale)
    return out.reshape(shape)


def auto(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    (o, i), rank = shape, settings.get("rank", 0)
    delta = dithered(parts["code"].data, shape, key)
    if not rank:
        return delta
    fix = parts["fix"].data
    scales = np.frombuffer(fix, "<f4", 2 * rank).astype(np.float64)[:, None]
    levels = np.frombuffer(fix, np.int8, offset=8 * rank).astype(np.float64)
    left, right = levels[: rank * o].reshape(rank, o), levels[rank * o :].reshape(rank, i)
    return delta + in_order(left * scales[:rank], right * scales[rank:])


def dithered(code: bytes, shape: Shape, key: int) -> np.ndarray:
    o, i = shape
    if not code:
        return np.zeros(shape, np.float32)
    unit, length = struct.unpack_from("<fI", code)
    at = 8 + length
    side = zstandard.ZstdDecompressor().decompress(code[8:at])
    flags, first, reach = struct.unpack_from("<Bhf", side)
    rest, found = side[7:], []
    for flag, size in ((1, o), (2, i), (4, o)):
        held = np.frombuffer(rest, np.int8, size) if flags & flag else np.zeros(size, np.int8)
        rest = rest[size:] if flags & flag else rest
        found.append(held.astype(np.int64))
    rows, columns, sizes = found
    if flags & 8:
        rows = -np.floor(sizes / 2).astype(np.int64)
    top, low, high = rest[:3]
    odds = np.frombuffer(rest, np.uint8, offset=3).reshape(17 * (high - low + 1), top)
    t = thresholds(key, o * i).reshape(shape)
    m = (half_octaves(rows - sizes) * np.float32(reach))[:, None] * half_octaves(columns)
    m = np.minimum(np.maximum(m, np.float32(1)), np.float32(4096))
    place = np.minimum(np.floor(t.astype(np.float32) / np.float32(4096) * m), 16).astype(np.int64)
    group = np.clip((rows - sizes)[:, None] + columns + first, 0, 10)
    context = 17 * (group - low) + place
    levels = []
    for start in range(0, o, max(1, 2**20 // i)):
        (n_words,) = struct.unpack_from("<I", code, at)
        words = struct.unpack_from(f"<{n_words}I", code, at + 4)
        at += 4 + 4 * n_words
        of_block = context[start : start + max(1, 2**20 // i)].reshape(-1)
        levels.append(coded_levels(list(words), of_block, odds))
    assert at == len(code)
    whole = np.concatenate(levels).reshape(shape).astype(np.float32)
    return whole * (half_octaves(rows) * np.float32(unit))[:, None] * half_octaves(columns)


def half_octaves(exponents: np.ndarray) -> np.ndarray:
    """2^(n/2), fp32: an exact power of two, times the fp32 nearest to the root of 2 for odd n."""
    odd = np.where(exponents % 2, np.float32(1.41421354), np.float32(1))
    return (2.0 ** (exponents // 2)).astype(np.float32) * odd


def thresholds(key: int, count: int) -> np.ndarray:
    numbers = random_u64(key, 0, -(-count // 4))
    return numbers.astype("<u8").view("<u2")[:count].astype(np.int64)


def count_of(odd: int) -> int:
    """floor(2^(13 (odd - 1) / 254)) by integers: the largest n with n^254 <= 2^(13 (odd - 1))."""
    n = round(2 ** (13 * (odd - 1) / 254)) + 2 if odd else 0
    while n**254 > 2 ** (13 * (odd - 1)) and odd:
        n -= 1
    return n


def table(odds: list[int]) -> list[int]:
    """Counts of the levels -K to K; they sum to 2^14."""
    counts = [count_of(odd) for odd in odds]
    return [*counts[::-1], 2**14 - 2 * sum(counts), *counts]


def coded_levels(words: list[int], contexts: np.ndarray, odds: np.ndarray) -> np.ndarray:
    """Levels of one block, flat: those of context 0 are coded first, then those of 1, ..."""
    state, out = 0, np.zeros(len(contexts), np.int64)
    while words and state < 2**32:
        state = 2**32 * state + words.pop()
    for context, row in enumerate(odds.tolist()):
        f = [2**10 * count for count in table(row)]
        left = [0, *itertools.accumulate(f)]
        for place in np.flatnonzero(contexts == context).tolist():
            q = state % 2**24
            symbol = bisect.bisect_right(left, q) - 1
            state = state // 2**24 * f[symbol] + q - left[symbol]
            if state < 2**32 and words:
                state = 2**32 * state + words.pop()
            out[place] = symbol - len(row)
    assert state == 0 and not words
    return out


def dare(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    total, kept = shape[0] * shape[1], settings["kept"]
    out = np.zeros(total, np.float32)
    values = factor(parts["values"])[0] * to_fp32(parts["scale"].bits, "F32")
    at = below_threshold(key, total, int(settings["threshold"], 16))
    out[at] = values * np.float32(total / max(1, kept))
    return out.reshape(shape)


def magnitude(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    total = shape[0] * shape[1]
    out = np.zeros(total, np.float32)
    at = elias_fano(parts["low"].data, parts["high"].data, settings["kept"], total)
    out[at] = factor(parts["values"])[0] * to_fp32(parts["scale"].bits, "F32")
    return out.reshape(shape)


# Codecs: every bit


def skip(parts: Parts, settings: dict, ref: np.ndarray, dtype: str) -> np.ndarray:
    return ref


def lossless(parts: Parts, settings: dict, ref: np.ndarray, dtype: str) -> np.ndarray:
    z = planes(parts, ref.dtype.itemsize)
    return undo_difference(z, ref.reshape(-1), dtype).reshape(ref.shape)


def sparse_patch(parts: Parts, settings: dict, ref: np.ndarray, dtype: str) -> np.ndarray:
    out = ref.reshape(-1).copy()
    if "bitmap" in parts:
        bits = np.unpackbits(np.frombuffer(inflate(parts["bitmap"]), np.uint8))
        at = np.flatnonzero(bits[: out.size])
    else:
        at = elias_fano(parts["low"].data, parts["high"].data, settings["changed"], out.size)
    out[at] = undo_difference(planes(parts, out.dtype.itemsize), out[at], dtype)
    return out.reshape(ref.shape)


def rows(parts: Parts, settings: dict, ref: np.ndarray, dtype: str) -> np.ndarray:
    out = ref.copy()
    at = np.cumsum(np.frombuffer(inflate(parts["index"]), "<i4"), dtype=np.int64)
    z = planes(parts, out.dtype.itemsize)
    out[at] = undo_difference(z, out[at].reshape(-1), dtype).reshape(len(at), -1)
    return out


MANTISSA = {"F64": 55, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
SIGNED = {"I64", "I32", "I16", "I8", "C64"}
EIGHTHS = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)


class Code:
    """Bytes that are read from the front."""

    def __init__(self, data: bytes):
        self.data = data

    def take(self, count: int) -> bytes:
        found, self.data = self.data[:count], self.data[count:]
        assert len(found) == count
        return found

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def row(self) -> list[int]:
        return list(self.take(self.number()))


def context_class(bits: int, dtype: str) -> int:
    if dtype in MANTISSA:
        width = 8 * np.dtype(BITS[dtype]).itemsize - 1 - MANTISSA[dtype]
        return (bits >> MANTISSA[dtype]) & ((1 << width) - 1)
    width = 8 * np.dtype(BITS[dtype]).itemsize
    if dtype in SIGNED and bits >> (width - 1):
        bits ^= (1 << width) - 1
    return bits.bit_length()


def filled(weights: list[int]) -> list[int]:
    alive = sum(1 for w in weights if w)
    total = sum(weights)
    out = [w * ((1 << 24) - alive) // total + 1 if w else 0 for w in weights]
    out[out.index(max(out))] += (1 << 24) - sum(out)
    return out


def stored_frequencies(row: list[int]) -> list[int]:
    return filled([EIGHTHS[(b - 255) % 8] << ((b - 255) // 8 + 32) if b else 0 for b in row])


def token_of(value: int, fine: int) -> tuple[int, int]:
    """(token, first value of the token after it)."""
    token = value if value < 16 else 16
    while token >= 16 and first_of(token + 1, fine) <= value:
        token += 1
    return token, first_of(token + 1, fine)


def first_of(token: int, fine: int) -> int:
    if token < 16:
        return token
    octave, part = divmod(token - 16, 1 << fine)
    return ((1 << fine) + part) << (octave + 4 - fine)


def gap_frequencies(marked: int, count: int) -> list[int]:
    tokens = token_of(count - marked, 3)[0] + 1
    miss = (count - marked) / count
    powers = [miss]
    while 1 << len(powers) <= count:
        powers.append(powers[-1] * powers[-1])
    tails, value = [], 1.0
    for _ in range(16):
        tails.append(value)
        value *= miss
    for octave in range(4, len(powers)):
        value = powers[octave]
        for _ in range(8):
            tails.append(value)
            value *= powers[octave - 3]
    tails = [*tails[:tokens], 0.0]
    return filled([max(1, int((a - b) * 2.0**36)) for a, b in itertools.pairwise(tails)])


class Ans:
    """The stream of words: see `Entropy coding` of the page."""

    def __init__(self, words: list[int]):
        self.words, self.state = words, 0
        while self.words and self.state < 1 << 32:
            self.state = (self.state << 32) | self.words.pop()

    def symbol(self, frequencies: list[int]) -> int:
        if max(frequencies) == 1 << 24:
            return frequencies.index(1 << 24)
        low, left, symbol = self.state % (1 << 24), 0, 0
        while low >= left + frequencies[symbol]:
            left += frequencies[symbol]
            symbol += 1
        self.state = (self.state >> 24) * frequencies[symbol] + low - left
        if self.state < 1 << 32 and self.words:
            self.state = (self.state << 32) | self.words.pop()
        return symbol

    def uniform(self, width: int) -> int:
        low = self.state % (1 << 24)
        size = 1 << (24 - width)
        self.state = (self.state >> 24) * size + low % size
        if self.state < 1 << 32 and self.words:
            self.state = (self.state << 32) | self.words.pop()
        return low // size

    def values(self, runs: list[tuple[int, list[int]]], fine: int) -> list[list[int]]:
        tokens = [[self.symbol(row) for _ in range(count)] for count, row in runs]
        flat = [token for run in tokens for token in run]
        values = [first_of(token, fine) for token in flat]
        for token in sorted({token for token in flat if token >= 16}):
            at = [n for n, each in enumerate(flat) if each == token]
            width = (token - 16 >> fine) + 4 - fine
            for low in range(0, width, 16):
                for n in at:
                    values[n] += self.uniform(min(16, width - low)) << low
        return [[values.pop(0) for _ in run] for run in tokens]


def context(parts: Parts, settings: dict, ref: np.ndarray, dtype: str) -> np.ndarray:
    code = Code(parts["code"].data)
    length = code.number()
    head = code.take(length >> 1)
    head = Code(zstandard.ZstdDecompressor().decompress(head) if length & 1 else head)
    ans = Ans([word for (word,) in struct.iter_unpack("<I", code.data)])
    count = head.number()
    flat = [int(bits) for bits in ref.reshape(-1)]
    classes = [context_class(bits, dtype) for bits in flat]
    if count & 1:
        origin = head.number()
        origin = ~(origin >> 1) if origin & 1 else origin >> 1
        tables = [stored_frequencies(head.row()) for _ in range(2)]
        sides = [[ans.symbol(t) for _ in range(n)] for n, t in zip(ref.shape, tables, strict=True)]
        both = [r + c + origin for r in sides[0] for c in sides[1]]
        classes = [min(255, max(0, b - 4 * max(1, c))) for b, c in zip(both, classes, strict=True)]
    groups, table, first = [], None, 0
    for _ in range(count >> 1):
        last, how = head.take(1)[0], head.number()
        members = [n for n, c in enumerate(classes) if first <= c <= last]
        own = stored_frequencies(head.row()) if how & 1 else None
        if not how & 2:
            table = own or table
        groups.append((members, how >> 2, bool(how & 2), own if how & 2 else table))
        first = last + 1
    sparse = [(m, k) for m, k, direct, _ in groups if k and not direct]
    gaps = ans.values([(k, gap_frequencies(k, len(m))) for m, k in sparse], 3)
    places = {
        id(m): [m[at] for at in np.cumsum(np.array(g) + 1) - 1]
        for (m, _), g in zip(sparse, gaps, strict=True)
    }
    filled_ = [(m, k, direct, t) for m, k, direct, t in groups if direct or k]
    moves = ans.values([(len(m) if d else k, t) for m, k, d, t in filled_], 2)
    out = ref.reshape(-1).copy()
    width = 8 * out.dtype.itemsize
    for (members, _, direct, _), run in zip(filled_, moves, strict=True):
        for at, z in zip(members if direct else places[id(members)], run, strict=True):
            step = -((z + 1) >> 1) if z & 1 else z >> 1
            floating = dtype in FLOATS
            if floating and flat[at] >> (width - 1):
                step = -step
            start = int(order(out[at : at + 1])[0]) if floating else flat[at]
            moved = np.array([(start + step) % (1 << width)], dtype=out.dtype)
            out[at] = (order(moved) if floating else moved)[0]
    return out.reshape(ref.shape)


DELTA = {"lowrank": lowrank, "impart": impart, "dare": dare, "magnitude": magnitude}
DELTA |= {"svd-quant": svd_quant, "delta-come": delta_come, "impart-qt": impart_qt}
DELTA |= {"dare-qt": dare_qt, "bitdelta": bitdelta, "auto": auto}
EXACT = {"skip": skip, "lossless": lossless, "sparse-patch": sparse_patch, "rows": rows}
EXACT["context"] = context


# The archive


def read_manifest(archive: Path) -> dict:
    raw = (archive / "delta.json").read_bytes()
    body, _, rest = raw.rpartition(b',"checksum":')
    assert rest == b'"' + hashlib.sha256(body).hexdigest()[:32].encode() + b'"}\n'
    return json.loads(raw)


def restore(archive: Path, base_folder: Path) -> Parts:
    """Every tensor of the fine-tune by name."""
    manifest = read_manifest(archive)
    assert manifest["format"] == "deltafold-archive" and manifest["format_version"] in (1, 2, 3)
    assert all(entry["version"] == 1 for entry in manifest["codecs"].values())
    payload = read_folder(archive)
    base = read_folder(base_folder)
    base |= {
        entry["name"]: joined(base, entry["counterpart"])
        for entry in manifest["tensors"]
        if "counterpart" in entry
    }
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    restored = {}
    for name, entry in entries.items():
        source = entries[entry.get("same_as", name)]
        data = b"".join(
            piece_bytes(manifest, source, n, payload, base) for n in range(len(pieces(source)))
        )
        restored[name] = Stored(entry["dtype"], tuple(entry["shape"]), data)
        approximated = any("error" in piece for piece in pieces(source))
        if not approximated:
            assert digest(restored[name], 32) == entry["tuned"], f"{name} came back otherwise"
        elif manifest["format_version"] > 1:
            assert digest(restored[name], 16) == source["restored"], f"{name} came back otherwise"
    return restored


def joined(base: Parts, counterpart: list[dict]) -> Stored:
    """Rows of the base's tensors, one after the other."""
    sources = [base[entry["name"]] for entry in counterpart]
    spans = [entry["rows"] for entry in counterpart]
    if len(sources) == 1 and spans[0] == [0, len(sources[0].matrix())]:
        return sources[0]
    rows = [s.matrix()[start:stop] for s, (start, stop) in zip(sources, spans, strict=True)]
    matrix = np.concatenate(rows)
    return Stored(sources[0].dtype, matrix.shape, matrix.tobytes())


def pieces(entry: dict) -> list[dict]:
    return entry.get("pieces", [])


def piece_bytes(manifest: dict, entry: dict, number: int, payload: Parts, base: Parts) -> bytes:
    """The bytes of one piece's rows, in the fine-tune's dtype."""
    piece, name, dtype = pieces(entry)[number], entry["name"], entry["dtype"]
    prefix = f"{name}::" if len(pieces(entry)) == 1 else f"{name}::{number}."
    parts = {part: payload[prefix + part] for part in piece.get("parts", {})}
    for part, checksum in piece.get("parts", {}).items():
        assert digest(parts[part], 16) == checksum, f"{prefix}{part} is damaged"
    whole = Stored(dtype, tuple(entry["shape"]), b"")
    n_rows = whole.matrix_shape[0]
    start, stop = piece.get("rows", (0, n_rows))
    shape = (stop - start, whole.columns)
    settings = piece.get("settings", {})
    if piece.get("reference", "base") == "none":
        reference = np.zeros(shape, BITS[dtype])
        return EXACT[piece["codec"]](parts, settings, reference, dtype).tobytes()
    assert digest(base[name], 32) == entry["base"], f"{name} of the base differs"
    before = base[name].matrix()[start:stop]
    if piece["codec"] in EXACT:
        if base[name].dtype != dtype:
            before = from_fp32(to_fp32(before, base[name].dtype), dtype)
        return EXACT[piece["codec"]](parts, settings, before, dtype).tobytes()
    key = derive_key(manifest["seed"], name, start)
    settings = manifest["codecs"][piece["codec"]]["config"] | settings
    delta = DELTA[piece["codec"]](parts, settings, shape, key)
    most = np.float32(LARGEST[dtype])
    total = np.clip(to_fp32(before, base[name].dtype) + delta, -most, most)
    return from_fp32(total, dtype).tobytes()


def side_files(archive: Path, base_folder: Path) -> dict[str, bytes]:
    """Config, tokenizer and the like, by file name."""
    manifest = read_manifest(archive)
    found = {}
    for entry in manifest["files"]:
        name, stored = entry["name"], entry["stored"]
        dictionary = b""
        if stored != "zstd":
            dictionary = (base_folder / name).read_bytes()
            assert hashlib.sha256(dictionary).hexdigest()[:32] == entry["base"]
        data = dictionary
        if stored != "base":
            raw = zstandard.ZstdCompressionDict(
                dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT
            )
            reader = zstandard.ZstdDecompressor(dict_data=raw if dictionary else None)
            frame = (archive / "files" / f"{name}.zst").read_bytes()
            if stored == "zstd-base" and manifest["format_version"] > 2:
                assert hashlib.sha256(frame).hexdigest()[:32] == entry["frame"]
            data = reader.decompress(frame)
        assert (
            hashlib.sha256(data).hexdigest()[:32] == entry["digest"]
            and len(data) == entry["n_bytes"]
        )
        found[name] = data
    return found
