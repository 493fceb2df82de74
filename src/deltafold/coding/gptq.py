"""Rounding that knows the inputs: GPTQ.

A matrix W (m x n) is rounded to Q on given grids. It meets inputs x with H = E[x x^T], so the error
to make small is not that of the entries but that of the outputs,

    E |(W - Q) x|^2 = sum over rows (w - q) H (w - q)^T

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv
2210.17323), equations 2 and 3 in the Cholesky form of its Algorithm 1. Columns are rounded in the
order given, and later ones make up for the error so far. With H^-1 = U^T U (U upper triangular):

    e = (w_j - q_j) / U_jj        for every row
    w_k -= e U_jk                 for the columns k > j that are not rounded yet

Grids are static, one per entry: level = (code - zero) * scale. They are fixed before, so that
entries can be stored in any order.

With a mask (ImPart-Qt, arXiv 2504.13237, Algorithms 2 and 3) only kept entries are rounded: a
dropped entry has no code, makes no error and takes none over. The matrix that H is inverted for is
then not that of the kept entries of a row, so the gain is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deltafold.coding.quantizer import nearest_code
from deltafold.lazy import torch

BLOCK = 128  # columns whose effect on all others is added in one product
_ROWS_BYTES = 64 << 20  # of one fp64 copy of the rows worked on at once
_ATTEMPTS = 12


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    width: int,
    mask: torch.Tensor | None = None,
    damping: float = 0.01,
) -> torch.Tensor:
    """Codes (m, n) uint8 of `weight` (m, n), fp32, on the grids `scale`, `zero` (m, n).

    `hessian` (n, n) is E[x x^T] up to a factor; `damping` times its mean diagonal is added to its
    diagonal. `mask` (m, n) is true where an entry is kept; dropped entries get code 0. fp64 inside.
    Raises ValueError if shapes do not fit or the hessian is not one.
    """
    factor = inverse_factor(hessian, damping)
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device="cpu")
    for rows, part in _row_chunks(weight, hessian, scale, zero, width, mask):
        codes[rows] = _round_columns(part, factor).T
    return codes


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U (n, n), fp64, upper triangular with (H + damping)^-1 = U^T U.

    Without forming the inverse: the Cholesky factor of H with its order reversed is U^-1. Where H is
    singular beyond the damping, the damping grows tenfold until it is not.
    """
    identity = torch.eye(len(hessian), dtype=torch.float64, device="cpu")
    for attempt in range(_ATTEMPTS):
        raised = max(damping, 1e-8) * 10**attempt if attempt else damping
        lower, info = torch.linalg.cholesky_ex(_damped(hessian, raised).flip(0, 1))
        if not int(info):
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    raise ValueError("the hessian is not positive semidefinite")


def _damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diag H) I in fp64; an input that is always zero gets a one there."""
    H = hessian.to(torch.float64, copy=True)
    if not bool(torch.isfinite(H).all()):
        raise ValueError("the hessian holds a value that is not a finite number")
    diagonal = H.diagonal()
    shifted = diagonal + damping * diagonal.mean()
    diagonal.copy_(torch.where(shifted > 0, shifted, 1.0))
    return H


@dataclass(frozen=True)
class _Columns:
    """Some rows of the matrix with their grids and mask, transposed: all (n, rows)."""

    weight: torch.Tensor  # fp64
    scale: torch.Tensor
    zero: torch.Tensor
    width: int
    kept: torch.Tensor | None

    def code(self, j: int, target: torch.Tensor) -> torch.Tensor:
        """Codes of column j, as floats, whose levels are nearest to `target` (rows,) fp64."""
        code = nearest_code(target.float(), self.scale[j], self.zero[j], self.width)
        return code if self.kept is None else torch.where(self.kept[j], code, 0.0)

    def error(self, j: int, code: torch.Tensor) -> torch.Tensor:
        """Level minus weight of column j, fp64; zero where dropped."""
        level = (code - self.zero[j]).double() * self.scale[j].double()
        error = level - self.weight[j]
        return error if self.kept is None else torch.where(self.kept[j], error, 0.0)


def _row_chunks(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    width: int,
    mask: torch.Tensor | None,
) -> Iterator[tuple[slice, _Columns]]:
    """The matrix in chunks of rows, which do not depend on each other."""
    m, n = weight.shape
    for name, matrix in (("scale", scale), ("zero", zero), ("mask", mask)):
        if matrix is not None and tuple(matrix.shape) != (m, n):
            raise ValueError(f"{name} is {tuple(matrix.shape)}, the weight {(m, n)}")
    if tuple(hessian.shape) != (n, n):
        raise ValueError(f"the hessian is {tuple(hessian.shape)}, not {(n, n)}")
    step = max(1, _ROWS_BYTES // (8 * max(1, n)))
    for start in range(0, m if n else 0, step):
        rows = slice(start, min(m, start + step))
        yield (
            rows,
            _Columns(
                weight[rows].T.to(torch.float64, copy=True).contiguous(),
                scale[rows].T.float().contiguous(),
                zero[rows].T.float().contiguous(),
                width,
                None if mask is None else mask[rows].T.contiguous(),
            ),
        )


def _round_columns(part: _Columns, factor: torch.Tensor) -> torch.Tensor:
    """GPTQ's codes (n, rows), with U = `factor`; `part.weight` is used up.

    Inside a block a column takes over the errors of the block's earlier ones when its turn comes;
    columns after the block take over the whole block's errors in one product.
    """
    n, rows = part.weight.shape
    codes = torch.zeros(n, rows, dtype=torch.uint8, device="cpu")
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        errors = torch.zeros(stop - start, rows, dtype=torch.float64, device="cpu")
        for j in range(start, stop):
            part.weight[j] += factor[start:j, j] @ errors[: j - start]
            code = part.code(j, part.weight[j])
            errors[j - start] = part.error(j, code) / factor[j, j]
            codes[j] = code.to(torch.uint8)
        part.weight[stop:] += factor[start:stop, stop:].T @ errors
    return codes
