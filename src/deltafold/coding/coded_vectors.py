"""Singular vectors in few bits: bands of components, each with its own width.

The components of a matrix are cut into bands. All stored entries of a band's vectors on one side (U
or V), one vector after the other, form one run: codes of one width on a symmetric grid, a 16-bit
scale for each 128 of them (`coding/quantizer.py`, unit 2^-10). Runs follow one another, band by
band, first V's, then U's:

    codes   | V, 8 bit | U, 8 bit | V, 3 bit | U, 3 bit | ...      each run starts on a whole byte
    scales  | V        | U        | V        | U        | ...

Vectors are r x size, a vector a row. With a mask only its entries are stored.

Rounding is to nearest, or by GPTQ (`coding/gptq.py`) where it is known what the vectors meet: V^T
meets the layer's input x, so its entries are the columns of GPTQ; U meets diag(s) V^T x, so there
its components are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deltafold.coding.gptq import gptq
from deltafold.coding.packing import pack, packed_bytes, unpack_u8
from deltafold.coding.quantizer import (
    Grid,
    Groups,
    dequantise,
    entry_grid,
    fit_groups,
    quantise,
)
from deltafold.dtypes import DTYPE_NAMES
from deltafold.lazy import torch

GROUP = 128
UNIT = 2.0**-10  # scales of unit vectors, and of some times those, then fit 16 bits of either kind
_LARGEST_SCALE = 65504.0  # of fp16
DAMPING = 0.01  # of the mean diagonal, as in GPTQ


class Band(NamedTuple):
    """Components `first` to `last` (not included), coded at `width` bits."""

    first: int
    last: int
    width: int


def bands(counts: Sequence[tuple[int, int]]) -> list[Band]:
    """Consecutive bands from (components, width); empty ones are left out."""
    found, first = [], 0
    for count, width in counts:
        if count:
            found.append(Band(first, first + count, width))
            first += count
    return found


def run_size(count: int, width: int) -> tuple[int, int]:
    """(bytes of codes, number of scales) of a run of `count` entries."""
    return packed_bytes(count, width), -(-count // GROUP)


@dataclass(frozen=True)
class Run:
    """One run as it is stored, and what it decodes to."""

    codes: torch.Tensor  # uint8, packed
    scales: torch.Tensor  # 16-bit
    vectors: torch.Tensor  # r x size, fp32; zero where masked


def code_run(
    vectors: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    hessian: torch.Tensor | None = None,
    across: bool = False,
    mask: torch.Tensor | None = None,
) -> Run:
    """Code `vectors` (r x size, entries of unit vectors, or not much larger) at `width` bits.

    `hessian`: second moments of what the entries meet (size x size) or, with `across`, of what the
    components meet (r x r), damped already. None rounds to nearest.
    """
    if mask is None:
        mask = torch.ones(vectors.shape, dtype=torch.bool, device="cpu")
    entries = vectors[mask].float()
    grid = Grid(width, GROUP, dtype_name=DTYPE_NAMES[dtype])
    fitted = fit_groups(entries, grid)
    scales = (fitted.scales.float() * (fitted.unit / UNIT)).clamp_max(_LARGEST_SCALE)
    groups = Groups(scales.to(dtype), None, UNIT)
    if hessian is None or not len(entries):
        codes = quantise(entries, grid, *groups)
    else:
        weight, scale, zero, kept = (
            x.T if across else x
            for x in (
                vectors.float(),
                *(_spread(x, mask) for x in entry_grid(len(entries), grid, groups)),
                mask,
            )
        )
        damping = 0.0 if across else DAMPING
        coded = gptq(weight, hessian, scale, zero, width, kept, damping)
        codes = (coded.T if across else coded)[mask]
    packed = torch.from_numpy(pack(codes.numpy(), width))
    return Run(packed, groups.scales, _spread(dequantise(codes, grid, *groups), mask))


def code_across(
    vectors: torch.Tensor,
    cut: Sequence[Band],
    dtype: torch.dtype,
    hessian: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> list[Run]:
    """Code U^T (r x size) band by band, as one pass of GPTQ over all components would.

    For errors e_A of the band at hand, the later components B can make up for most of it: the best
    they can do is e_B = -H_BB^-1 H_BA e_A, and what then remains is e_A^T (H_AA - H_AB H_BB^-1 H_BA)
    e_A. So the band is rounded under that Schur complement, then e_B is added to the later ones.
    (Not quite one pass where there is a mask: errors that GPTQ had meant for a dropped entry are
    lost inside a band, but what is left of them after it the later bands make up for.)
    """
    work = vectors.double()
    runs = []
    for band in cut:
        here, later = slice(band.first, band.last), slice(band.last, len(vectors))
        kept = None if mask is None else mask[here]
        schur = link = None
        if hessian is not None:
            link = torch.linalg.solve(hessian[later, later], hessian[later, here])
            schur = hessian[here, here] - hessian[here, later] @ link
        run = code_run(work[here], band.width, dtype, schur, across=True, mask=kept)
        runs.append(run)
        if link is not None:
            error = run.vectors - work[here]
            work[later] -= link @ (error if kept is None else error * kept)
    return runs


def full_hessian(second: torch.Tensor) -> torch.Tensor | None:
    """What GPTQ can use of the second moments (i, i): nothing if only their diagonal (i,) is known.

    A diagonal couples no two entries, so under it GPTQ is rounding to nearest.
    """
    return second if second.ndim == 2 else None


def inner_hessian(
    hessian: torch.Tensor, vectors: torch.Tensor, gains: torch.Tensor
) -> torch.Tensor | None:
    """E[z z^T] of z = diag(gains) V^T x, r x r in fp64; None if that is zero.

    `hessian` is E[x x^T] (i x i), `vectors` V^T as decoded (r x i). Damped before the gains come
    in: so a weak component is damped by the same share as a strong one.
    """
    wide = vectors.double()
    inner = wide @ hessian.double() @ wide.T
    mean = float(inner.diagonal().mean()) if len(inner) else 0.0
    if mean <= 0.0:
        return None
    inner.diagonal().add_(DAMPING * mean)
    return gains.double()[:, None] * inner * gains.double()


def join(runs: Sequence[Run], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parts `codes` (bytes,) and `scales` (groups,) of runs in order."""
    none = torch.zeros(0, dtype=torch.uint8, device="cpu")
    return {
        "codes": torch.cat([none, *(run.codes for run in runs)]),
        "scales": torch.cat([none.to(dtype), *(run.scales for run in runs)]),
    }


class RunReader:
    """Takes runs off the parts `codes` and `scales`, in order."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor):
        self.codes, self.scales = codes, scales

    def take(self, count: int, width: int) -> torch.Tensor:
        """The entries (count,) of the next run, fp32. Raises ValueError if there are too few."""
        n_bytes, n_scales = run_size(count, width)
        if count < 0 or n_bytes > len(self.codes) or n_scales > len(self.scales):
            raise ValueError("the codes end too early")
        codes, self.codes = self.codes[:n_bytes], self.codes[n_bytes:]
        scales, self.scales = self.scales[:n_scales], self.scales[n_scales:]
        unpacked = torch.from_numpy(unpack_u8(codes.numpy(), width, count))
        return dequantise(
            unpacked, Grid(width, GROUP, dtype_name=DTYPE_NAMES[scales.dtype]), scales, None, UNIT
        )

    def finish(self) -> None:
        """Raises ValueError if anything is left."""
        if len(self.codes) or len(self.scales):
            raise ValueError("there are more codes than the settings say")


def _spread(entries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Entries (n,) at their places in a matrix of the mask's shape, zero elsewhere."""
    out = torch.zeros(mask.shape, dtype=entries.dtype, device="cpu")
    out[mask] = entries
    return out
