"""Codecs on tensors in memory: a delta becomes parts, and parts become a delta again.

    codec = deltafold.codec("svd-quant", share=1 / 16)
    parts = codec.encode(delta)
    delta = codec.decode(parts)

Keys, settings and singular triplets, which a codec wants of its caller, are seen to here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltafold.codecs import delta_codec, exact_codec, get, names
from deltafold.codecs.base import DeltaCodec, Parts, Settings, VariableCodec, parts_bytes
from deltafold.coding.counter import derive_key
from deltafold.coding.sums import all_finite
from deltafold.dtypes import folded
from deltafold.errors import UsageError, nearest
from deltafold.lazy import torch
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import DenseMatrix, Factors, RowMatrix
from deltafold.running.neutral import undisturbed

SHARE = 1 / 16
ROUNDS = 6  # tries at the size of a codec whose bytes are known only after encoding
NEAR = 0.98  # share of the bytes allowed that is near enough


@dataclass(frozen=True)
class Encoded:
    """What a codec made of one tensor.

    `tensors` are the stored parts by name, `settings` what decoding needs beside them (short, fit for
    JSON), `shape` that of the tensor.
    """

    codec: str
    shape: tuple[int, ...]
    settings: Settings
    tensors: Parts

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts, to the byte; `settings` not counted."""
        return parts_bytes(self.tensors)


@dataclass(frozen=True)
class TensorCodec:
    """A codec with its settings, for tensors of any shape, seen as matrices of their last dimension.

    `share` is what parts may take of a delta's bytes at 16 bits a value; None for exact codecs.
    """

    name: str
    share: float | None
    seed: int
    settings: dict[str, Any]

    @undisturbed
    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None = None) -> Encoded:
        """Parts of `tensor`.

        For a codec that approximates, `tensor` is the delta, of any floating dtype, and there is no
        base. For an exact one it is the fine-tune's, and `base` has its shape and dtype. Raises
        UsageError.
        """
        shape = tuple(tensor.shape)
        if self.share is None:
            base = self._base(base, shape, tensor.dtype)
            settings, parts = exact_codec(self.name).encode(_matrix(base), _matrix(tensor))
            return Encoded(self.name, shape, settings, parts)
        if base is not None:
            raise UsageError(f"{self.name} encodes a delta; give tensor - base, and no base.")
        if not tensor.is_floating_point() or not all_finite(tensor):
            raise UsageError(f"{self.name} encodes finite floating-point numbers only.")
        codec, matrix = delta_codec(self.name, self.settings), DenseMatrix(_matrix(tensor).float())
        target = self.share * 2 * tensor.numel()
        if isinstance(codec, VariableCodec):
            settings, parts = _tried(codec, matrix, target, self._key)
        else:
            settings, parts = _fitted(codec, matrix, target, self._key)
        return Encoded(self.name, shape, settings, parts)

    @undisturbed
    def decode(self, parts: Encoded, base: torch.Tensor | None = None) -> torch.Tensor:
        """The delta in fp32, or, for an exact codec and with the same `base`, every bit of the tensor.

        In the shape that was encoded: any shape. Raises UsageError; ValueError if parts do not fit
        together.
        """
        if parts.codec != self.name:
            raise UsageError(f"These parts are of {parts.codec}, not of {self.name}.")
        if self.share is None:
            base = self._base(base, parts.shape)
            exact = exact_codec(self.name).decode(parts.tensors, parts.settings, _matrix(base))
            return exact.reshape(parts.shape)
        shape = folded(parts.shape)
        out = torch.zeros(shape, dtype=torch.float32, device="cpu")
        codec = delta_codec(self.name, self.settings)
        for start, rows in codec.decode(parts.tensors, parts.settings, shape, self._key):
            out[start : start + len(rows)] = rows
        return out.reshape(parts.shape)

    @property
    def _key(self) -> int:
        return derive_key(self.seed, "")

    def _base(
        self, base: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if base is None:
            raise UsageError(f"{self.name} is exact: it needs the base's tensor; give base.")
        if tuple(base.shape) != shape or dtype not in (None, base.dtype):
            raise UsageError(
                f"The base's tensor is {base.dtype} {list(base.shape)}, the fine-tune's "
                f"{dtype or 'of shape'} {list(shape)}; {self.name} needs the same dtype and shape."
            )
        return base


def codec(name: str, *, share: float | None = None, seed: int = 0, **settings: Any) -> TensorCodec:
    """The codec of a method, ready for tensors in memory.

    Args:
        name: what `--method` takes, e.g. `impart`; `deltafold methods` lists them.
        share: what the parts may take of a delta's bytes at 16 bits a value; default 1/16. Exact
            codecs take what they need.
        seed: of random positions and thresholds; decoding needs the same.
        settings: the method's own, e.g. `value_dtype="bf16"`.

    Raises UsageError.

    >>> codec("lowrank", share=1 / 8).name
    'lowrank'
    """
    offered = [each for each in names() if get(each).method]
    if name not in offered:
        raise UsageError(f"There is no method {name!r}; {nearest(name, offered)}")
    if not get(name).lossy:
        if share is not None or settings:
            raise UsageError(f"{name} is an exact codec and takes no settings.")
        return TensorCodec(name, None, seed, {})
    delta_codec(name, settings)  # refuses what it does not know
    share = SHARE if share is None else share
    if not 0 < share <= 1:
        raise UsageError(f"share must lie between 0 and 1, not {share!r}.")
    return TensorCodec(name, share, seed, settings)


def enough_triplets(
    codec: DeltaCodec, delta: RowMatrix, share: float, key: int, factors: Factors, rank: int
) -> Factors:
    """The leading singular triplets that `codec` can use at `share`.

    Taken of `factors`, for which `rank` were asked, or of more that are computed where these end early.
    """
    while True:
        used = codec.components_used(delta.shape, share, factors.s.double().numpy())
        if used is not None or factors.rank < rank or rank >= min(delta.shape):
            break
        rank = min(4 * rank, *delta.shape)
        factors = truncated_svd(delta, rank, key)
    keep = factors.rank if used is None else min(used, factors.rank)
    return Factors(factors.u[:, :keep], factors.s[:keep], factors.v[:, :keep])


def _fitted(
    codec: DeltaCodec, delta: DenseMatrix, target: float, key: int
) -> tuple[Settings, Parts]:
    factors = spectrum = None
    if codec.uses_factors:
        limit = codec.largest_share(delta.shape, target)
        rank = max(1, codec.components_for(delta.shape, limit))
        first = truncated_svd(delta, rank, key)
        factors = enough_triplets(codec, delta, limit, key, first, rank)
        spectrum = factors.s.double().numpy()
    settings, _ = codec.fit(delta.shape, target, spectrum, False)
    return codec.encode(delta, settings, key, factors)


def _tried(
    codec: VariableCodec, delta: DenseMatrix, target: float, key: int
) -> tuple[Settings, Parts]:
    """The finest step found whose parts take at most `target` bytes: true bytes correct the estimate."""
    share = target / (2 * delta.shape[0] * delta.shape[1])
    best, most = codec.encode(delta, codec.settings_for(delta.shape, 0.0), key), -1
    for _ in range(ROUNDS):
        made = codec.encode(delta, codec.settings_for(delta.shape, share), key)
        n_bytes = parts_bytes(made[1])
        if most < n_bytes <= target:
            best, most = made, n_bytes
        if n_bytes == 0 or NEAR * target <= n_bytes <= target:
            break
        share *= (1 + NEAR) / 2 * target / n_bytes
    return best


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(folded(tuple(tensor.shape)))
