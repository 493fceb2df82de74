"""`impart-qt`: importance-aware sparsification, the kept entries in 8, 3 and 2 bits.

Source: "ImPart: Importance-Aware Delta-Sparsification for Improved Model Compression and Merging in
LLMs" (ACL 2025, arXiv 2504.13237), section 7.1, Algorithms 2 and 3. What is kept is decided by
Algorithm 1, as in `impart`:

    p_j   = (1 - (s_j / s_1)^C) gamma            of column j of U and of V, int(size p_j) are dropped
    gamma = (alpha - beta) / (1 - beta)          alpha: the sparsity of U and V

Components 1-2 have 8 bits an entry, 3-34 have 3, the rest 2. A share pays for 16 o i share bits;
alpha is the smallest, found by bisection, at which all kept entries at their widths fit in. What is
kept is multiplied by size / kept.

V is rounded by GPTQ under E[x x^T] of the layer's inputs, then U, in one pass over all components,
under that of diag(s) V'^T x with the sparse, rounded, rescaled V'; the masks hold at every step:
dropped entries take over no error. Without moments both are rounded to nearest.

How many entries each column keeps is not stored: it follows from s as it is stored, by arithmetic
that is the same everywhere (`power` uses products and square roots only).

Layout (`coding/coded_vectors.py`), for a active components, kept entries vector after vector:

    codes   uint8      V 8 bit | U 8 bit | V 3 bit | U 3 bit | V 2 bit | U 2 bit    packed
    scales  fp16/bf16  in the same order, one for 128 entries
    s       bf16       a

Lost: the components after the a-th; of the others all entries not drawn (right on average), and the
rounding of what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from deltafold.codecs.base import (
    DeltaCodec,
    Parts,
    PartSpec,
    Settings,
    Shape,
    Spectrum,
    check_parts,
)
from deltafold.codecs.impart import ImpartConfig, Sparsity, kept_counts, sparsity
from deltafold.coding.coded_vectors import (
    Band,
    RunReader,
    bands,
    code_across,
    code_run,
    full_hessian,
    inner_hessian,
    join,
    run_size,
)
from deltafold.coding.counter import subset
from deltafold.coding.sums import product_rows
from deltafold.lazy import torch
from deltafold.linalg.decomposition import truncated_svd
from deltafold.linalg.matrices import Factors, Moments, RowMatrix

_U_STREAM, _V_STREAM = 0x75, 0x76  # xor-ed into the key, as in `impart`
_AT_8, _AT_3 = 2, 32
_STEPS = 24  # of bisection: finer than an entry of the largest matrices
_PLACES = 16  # binary places of the exponent C

Counts = NDArray[np.int64]


class ImpartQt(DeltaCodec):
    name = "impart-qt"
    title = "sparse vectors, 8/3/2 bits; seeded"
    seeded = True
    paper = "arXiv 2504.13237"
    uses_factors = True
    uses_moments = True
    value_parts = ("codes",)
    Config = ImpartConfig
    config: ImpartConfig

    def components_for(self, shape: Shape, share: float) -> int:
        """As many as `impart` would want for the entries that 2 bits each pay for."""
        o, i = shape
        most = int(min(o, i) * (1.0 - self.config.beta))
        return max(8, min(most, int(6 * 8 * o * i * share / (o + i))))

    def components_used(self, shape: Shape, share: float, spectrum: Spectrum) -> int | None:
        """Active components; None if the prefix `spectrum` does not reach past them."""
        found = self.settings_for(shape, share, spectrum)
        active = int(found["active"])
        if active < len(spectrum):
            return active + 1
        most = min(shape) * (1.0 - self.config.beta) if found["gamma"] else min(shape)
        return None if len(spectrum) < int(most) else active

    def settings_for(
        self, shape: Shape, share: float, spectrum: Spectrum | None = None
    ) -> Settings:
        budget = 2 * shape[0] * shape[1] * share
        return self._largest(shape, spectrum, lambda s: int(s["code_bytes"]) <= budget)

    def fit(
        self, shape: Shape, target_bytes: float, spectrum: Spectrum | None, nominal: bool
    ) -> tuple[Settings, int]:
        """Bisection on alpha at once, not on a share that leads to one."""
        measure = self.value_bytes if nominal else self.part_bytes
        best = self._largest(shape, spectrum, lambda s: measure(shape, s) <= target_bytes)
        return best, measure(shape, best)

    def _largest(
        self, shape: Shape, spectrum: Spectrum | None, fits: Callable[[Settings], bool]
    ) -> Settings:
        """Settings of the smallest alpha, to `_STEPS` bits, that `fits`; of alpha 1 if none does."""
        stored = None if spectrum is None else _stored(np.asarray(spectrum))
        low, high = 0.0, 1.0
        best = self._settings(shape, 0.0, spectrum, stored)
        if fits(best):
            return best
        best = self._settings(shape, 1.0, spectrum, stored)
        for _ in range(_STEPS):
            alpha = (low + high) / 2
            settings = self._settings(shape, alpha, spectrum, stored)
            if fits(settings):
                high, best = alpha, settings
            else:
                low = alpha
        return best

    def _settings(
        self,
        shape: Shape,
        alpha: float,
        spectrum: Spectrum | None,
        stored: NDArray[np.float64] | None,
    ) -> Settings:
        o, i = shape
        share = (1.0 - alpha) * min(shape) * (o + i) / (o * i)  # of entries, as `impart` counts
        if spectrum is None or stored is None:  # headers only: components kept whole
            full = int(min(shape) * (1.0 - alpha))
            found, stored = Sparsity(alpha, 0.0, full, np.zeros(full)), np.ones(full)
        else:
            found = sparsity(shape, share, spectrum, self.config.beta, self.config.c)
        active, gamma = len(found.p), float(f"{found.gamma:.6g}")
        kept = self._kept(shape, stored[:active], gamma)
        runs = [
            run_size(int(counts[band.first : band.last].sum()), band.width)
            for band in _cut(active)
            for counts in kept
        ]
        return {
            "active": active,
            "gamma": gamma,
            "code_bytes": sum(n_bytes for n_bytes, _ in runs),
            "groups": sum(scales for _, scales in runs),
        }

    def _kept(
        self, shape: Shape, stored: NDArray[np.float64], gamma: float
    ) -> tuple[Counts, Counts]:
        """Entries kept of each column of U and of V. `stored`: s as stored, fp64.

        Raises ValueError if they cannot be sizes of sets.
        """
        if not len(stored):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if not (0 < stored[0] < np.inf and ((stored >= 0) & (stored <= stored[0])).all()):
            raise ValueError("the singular values do not lie between zero and the first")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}")
        p = (1.0 - power(stored / stored[0], self.config.c)) * gamma
        return kept_counts(p, shape[0]), kept_counts(p, shape[1])

    def layout(self, shape: Shape, settings: Settings) -> dict[str, PartSpec]:
        return {
            "codes": PartSpec("U8", (int(settings["code_bytes"]),)),
            "scales": PartSpec(self.config.dtype_name, (int(settings["groups"]),)),
            "s": PartSpec("BF16", (int(settings["active"]),)),
        }

    def encode(
        self,
        delta: RowMatrix,
        settings: Settings,
        key: int,
        factors: Factors | None = None,
        moments: Moments | None = None,
    ) -> tuple[Settings, Parts]:
        shape = delta.shape
        if factors is None or factors.rank < int(settings["active"]):
            factors = truncated_svd(delta, min(shape), key)
            spectrum = factors.s.double().numpy()
            settings, _ = self.fit(shape, self.value_bytes(shape, settings), spectrum, True)
        active, dtype = int(settings["active"]), self.config.torch_dtype
        s = factors.s[:active].bfloat16()
        kept_u, kept_v = self._kept(shape, _stored(s.double().numpy()), float(settings["gamma"]))
        mask_u = _mask(kept_u, shape[0], key ^ _U_STREAM)
        mask_v = _mask(kept_v, shape[1], key ^ _V_STREAM)
        u = factors.u[:, :active].T * (factors.s[:active] / s.float())[:, None]
        v = factors.v[:, :active].T
        cut = _cut(active)
        hessian = None if moments is None else full_hessian(moments.second)
        right = [code_run(v[a:b], width, dtype, hessian, mask=mask_v[a:b]) for a, b, width in cut]
        meets = None
        if hessian is not None and cut:
            vectors = torch.cat([run.vectors for run in right]) * _gain(kept_v, shape[1])
            meets = inner_hessian(hessian, vectors, s.float() * _gain(kept_u, shape[0])[:, 0])
        left = code_across(u, cut, dtype, meets, mask_u)
        runs = [run for pair in zip(right, left, strict=True) for run in pair]
        return settings, {**join(runs, dtype), "s": s}

    def factors(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_parts(parts, self.layout(shape, settings))
        o, i = shape
        s = parts["s"]
        kept_u, kept_v = self._kept(shape, _stored(s.double().numpy()), float(settings["gamma"]))
        mask_u, mask_v = _mask(kept_u, o, key ^ _U_STREAM), _mask(kept_v, i, key ^ _V_STREAM)
        u, v = (
            torch.zeros(mask_u.shape, dtype=torch.float32, device="cpu"),
            torch.zeros(mask_v.shape, dtype=torch.float32, device="cpu"),
        )
        reader = RunReader(parts["codes"], parts["scales"])
        for a, b, width in _cut(len(s)):
            for vectors, mask, kept in ((v, mask_v, kept_v), (u, mask_u, kept_u)):
                vectors[a:b][mask[a:b]] = reader.take(int(kept[a:b].sum()), width)
        reader.finish()
        return u * _gain(kept_u, o) * s.float()[:, None], v * _gain(kept_v, i)

    def decode(
        self, parts: Mapping[str, torch.Tensor], settings: Settings, shape: Shape, key: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        yield from product_rows(*self.factors(parts, settings, shape, key))


def power(x: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """x^exponent for x in [0, 1], the exponent rounded to 16 binary places.

    By products and square roots, whose fp64 results IEEE 754 fixes to the last bit; those of `pow`
    differ between machines.
    """
    whole, places = divmod(round(exponent * (1 << _PLACES)), 1 << _PLACES)
    result = np.ones_like(x)
    for _ in range(whole):
        result = result * x
    root = x
    for bit in range(_PLACES - 1, -1, -1):
        root = np.sqrt(root)
        if places >> bit & 1:
            result = result * root
    return result


def _cut(active: int) -> list[Band]:
    at_8 = min(_AT_8, active)
    at_3 = min(_AT_3, active - at_8)
    return bands([(at_8, 8), (at_3, 3), (active - at_8 - at_3, 2)])


def _stored(s: Spectrum) -> Spectrum:
    """Singular values as they are stored, rounded to bf16 (half to even), in fp64."""
    bits = s.astype(np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def _gain(kept: Counts, size: int) -> torch.Tensor:
    """size / kept of each column, a x 1, fp32."""
    return torch.from_numpy(size / np.maximum(kept, 1)).float()[:, None]


def _mask(kept: Counts, size: int, key: int) -> torch.Tensor:
    """Which entries of each column are kept, a x size."""
    mask = torch.zeros(len(kept), size, dtype=torch.bool, device="cpu")
    for j, keep in enumerate(kept.tolist()):
        mask[j, torch.from_numpy(subset(key, j, size, keep))] = True
    return mask


CODEC = ImpartQt
