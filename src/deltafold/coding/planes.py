"""Differences of bit patterns, split into byte planes and compressed: the lossless path.

A float's bits, read as a sign-magnitude integer, order like the floats themselves. The difference
of two such integers counts the representable values between them: tiny for a fine-tune. Zig-zag
makes it unsigned, and one zstd frame a byte plane stores the nearly empty high bytes for nothing.

    fine-tune  bits -> ordered integer  \\
                                          -  -> zig-zag -> planes (low .. high) -> zstd each
    reference  bits -> ordered integer  /
"""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

from deltafold.dtypes import DTYPES
from deltafold.foreign import shortage
from deltafold.lazy import torch

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LOW_LEVEL = 1  # low planes hold no repeats: higher levels are slower and come out larger
HIGH_LEVEL = 9  # the highest plane is nearly empty


def bit_pattern(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    """The bits of a tensor of any shape as unsigned integers (n,) of the same width; no copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(DTYPES[f"U{8 * flat.element_size()}"]).numpy()


def from_bit_pattern(
    bits: NDArray[np.unsignedinteger], dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Inverse of `bit_pattern`, for any shape."""
    if not bits.size:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype).reshape(shape)


def ordered(bits: NDArray[np.unsignedinteger], floating: bool) -> NDArray[np.unsignedinteger]:
    """Map float bits to integers in the floats' order (an involution); integers stay."""
    if not floating:
        return bits
    width = bits.dtype.itemsize * 8
    sign = (bits >> bits.dtype.type(width - 1)).astype(bits.dtype)
    mask = (bits.dtype.type(0) - sign) & bits.dtype.type((1 << (width - 1)) - 1)
    return bits ^ mask


def difference(tuned: torch.Tensor, reference: torch.Tensor) -> NDArray[np.unsignedinteger]:
    """Zig-zagged difference (n,) of the ordered bit patterns of two tensors of one shape.

    Modulo 2^width.
    """
    floating = tuned.dtype.is_floating_point
    a, b = ordered(bit_pattern(tuned), floating), ordered(bit_pattern(reference), floating)
    d = a - b
    width = d.dtype.itemsize * 8
    negative = d.dtype.type(0) - (d >> d.dtype.type(width - 1))
    return (d << d.dtype.type(1)) ^ negative


def undo_difference(zigzag: NDArray[np.unsignedinteger], reference: torch.Tensor) -> torch.Tensor:
    """The fine-tune's tensor from its difference (n,) to `reference`, of the same shape; every bit."""
    one = zigzag.dtype.type(1)
    d = (zigzag >> one) ^ (zigzag.dtype.type(0) - (zigzag & one))
    floating = reference.dtype.is_floating_point
    bits = ordered(d + ordered(bit_pattern(reference), floating), floating)
    return from_bit_pattern(bits, reference.dtype, tuple(reference.shape))


def compress_planes(values: NDArray[np.unsignedinteger]) -> dict[str, torch.Tensor]:
    """Byte planes of `values` (n,), low to high, one zstd frame each: {"plane0": bytes (m,), ...}."""
    raw = np.ascontiguousarray(values).view(np.uint8)
    raw = raw.reshape(len(values), values.dtype.itemsize)
    parts = {}
    for plane in range(values.dtype.itemsize):
        level = HIGH_LEVEL if plane == values.dtype.itemsize - 1 else LOW_LEVEL
        compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
        frame = compressor.compress(np.ascontiguousarray(raw[:, plane]).tobytes())
        parts[f"plane{plane}"] = _byte_tensor(frame if len(values) else b"")
    return parts


def decompress_planes(
    parts: dict[str, torch.Tensor], itemsize: int, count: int
) -> NDArray[np.unsignedinteger]:
    """Inverse of `compress_planes`, (count,).

    Raises ValueError if a frame does not hold `count` bytes.
    """
    out = np.empty((count, itemsize), dtype=np.uint8)
    for plane in range(itemsize):
        out[:, plane] = np.frombuffer(inflate(parts[f"plane{plane}"], count), dtype=np.uint8)
    return out.view(_UNSIGNED[itemsize]).reshape(-1)


def inflate(part: torch.Tensor, expected_bytes: int) -> bytes:
    """What one zstd frame (n,) holds, exactly `expected_bytes`.

    Raises ValueError for anything else, before it is unpacked.
    """
    frame = part.numpy().tobytes()
    if not frame and not expected_bytes:
        return b""
    try:
        if zstandard.frame_content_size(frame) != expected_bytes:
            raise ValueError(f"a compressed part does not hold the promised {expected_bytes} bytes")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=expected_bytes)
    except zstandard.ZstdError as error:
        raise shortage(error) or ValueError(f"a compressed part is damaged ({error})") from None


def inflate_any(part: torch.Tensor, most_bytes: int) -> bytes:
    """What one zstd frame (n,) holds, at most `most_bytes`. Raises ValueError for anything else."""
    try:
        size = zstandard.frame_content_size(part.numpy().tobytes())
    except zstandard.ZstdError as error:
        raise shortage(error) or ValueError(f"a compressed part is damaged ({error})") from None
    if not 0 <= size <= most_bytes:
        raise ValueError(f"a compressed part holds more than {most_bytes} bytes")
    return inflate(part, size)


def deflate(data: bytes) -> torch.Tensor:
    """One zstd frame as a uint8 tensor (n,)."""
    frame = zstandard.ZstdCompressor(level=19, write_content_size=True).compress(data)
    return _byte_tensor(frame)


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
