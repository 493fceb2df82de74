"""A reader of archives written from `docs/format.md` alone: numpy, json, struct, zstandard.

It imports nothing of deltafold. `test_docs.py` lets it restore archives of every codec and compares
with what `deltafold restore` gives: if the page and the program part ways, that test fails.
It reads whole tensors, and checks every digest; it is written to be read, not to be fast.
"""

from __future__ import annotations

import hashlib
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
BITS |= {"F8_E4M3": "u1", "F8_E5M2": "u1"}


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
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else math.prod(self.shape)

    def matrix(self) -> np.ndarray:
        """Bits as rows x columns."""
        rows = math.prod(self.shape[:-1]) if len(self.shape) > 1 else 1
        return self.bits.reshape(rows, self.columns)


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
    return {
        k: v
        for file in sorted(folder.glob("*.safetensors"))
        for k, v in read_safetensors(file).items()
    }


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
    if "F" not in dtype:
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
    return ((u * s).astype(np.float64).T @ v.astype(np.float64)).astype(np.float32)


def factor(part: Stored) -> np.ndarray:
    return to_fp32(part.matrix(), part.dtype)


def impart(parts: Parts, settings: dict, shape: Shape, key: int) -> np.ndarray:
    kept = parts["kept"].bits.view("<i4").reshape(2, -1)
    u = spread(factor(parts["u"])[0], kept[0], shape[0], key ^ 0x75)
    v = spread(factor(parts["v"])[0], kept[1], shape[1], key ^ 0x76)
    s = to_fp32(parts["s"].matrix().reshape(-1, 1), "F32")
    return ((u * s).astype(np.float64).T @ v.astype(np.float64)).astype(np.float32)


def spread(values: np.ndarray, kept: np.ndarray, size: int, key: int) -> np.ndarray:
    out, used = np.zeros((len(kept), size), np.float32), 0
    for j, keep in enumerate(kept.tolist()):
        at = subset(key, j, size, keep)
        out[j, at] = values[used : used + keep] * np.float32(size / max(1, keep))
        used += keep
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


DELTA = {"lowrank": lowrank, "impart": impart, "dare": dare, "magnitude": magnitude}
EXACT = {"skip": skip, "lossless": lossless, "sparse-patch": sparse_patch, "rows": rows}


# The archive


def read_manifest(archive: Path) -> dict:
    raw = (archive / "delta.json").read_bytes()
    body, _, rest = raw.rpartition(b',"checksum":')
    assert rest == b'"' + hashlib.sha256(body).hexdigest()[:32].encode() + b'"}\n'
    return json.loads(raw)


def restore(archive: Path, base_folder: Path) -> Parts:
    """Every tensor of the fine-tune by name."""
    manifest = read_manifest(archive)
    assert (manifest["format"], manifest["format_version"]) == ("deltafold-archive", 1)
    assert all(entry["version"] == 1 for entry in manifest["codecs"].values())
    payload = read_folder(archive)
    base = read_folder(base_folder)
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    restored = {}
    for name, entry in entries.items():
        source = entries[entry.get("same_as", name)]
        data = b"".join(
            piece_bytes(manifest, source, n, payload, base) for n in range(len(pieces(source)))
        )
        restored[name] = Stored(entry["dtype"], tuple(entry["shape"]), data)
    return restored


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
    n_rows = math.prod(whole.shape[:-1]) if len(whole.shape) > 1 else 1
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
    delta = DELTA[piece["codec"]](parts, settings, shape, key)
    return from_fp32(to_fp32(before, base[name].dtype) + delta, dtype).tobytes()


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
            data = reader.decompress((archive / "files" / f"{name}.zst").read_bytes())
        assert (
            hashlib.sha256(data).hexdigest()[:32] == entry["digest"]
            and len(data) == entry["n_bytes"]
        )
        found[name] = data
    return found
