"""Truncated singular value decomposition of a delta, by the cheapest route that is good enough.

Never a full SVD: either the eigenvectors of the smaller Gram matrix (exact enough to truncate, about
five times faster), or, when few components are wanted, a randomised range finder (Halko, Martinsson
and Tropp 2011) with oversampling 32 and 4 power steps, whose error stays within 1 % of the optimum.
Both read the matrix in chunks of rows, so that a tall matrix (an embedding) is never held whole.

Float64 inside: its rounding noise lies far below the 16 bits in which factors are stored, which is
what makes stored bytes agree between machines. On a GPU whose fp64 is slow it is fp32, and what is not
orthonormal to the last of those 16 bits is computed again in fp64. There the matrix stays while it is
worked on, and matrices of one shape go together (`truncated_svds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from deltafold.coding.counter import gaussian
from deltafold.lazy import torch
from deltafold.linalg.matrices import (
    CHUNK_BYTES,
    DenseMatrix,
    Factors,
    RowMatrix,
    chunks,
    rows_at_once,
)
from deltafold.running.devices import free_bytes, here, place, put, wide

OVERSAMPLING = 32
POWER_STEPS = 4
SMALL_SIDE = 1024  # up to here the Gram matrix is decomposed in less time than passes over D take
GPU_CHUNKS = 8  # so many times larger where a GPU computes: it starts slowly
HELD_SHARE = 8  # a matrix may take one in so many bytes that are free on a GPU
SKEW = 2.0**-11
"""Largest product of two columns of U, or of V, that stay where fp32 made them: one step of fp16."""


def _room() -> int:
    return CHUNK_BYTES * (GPU_CHUNKS if place().is_gpu else 1)


def _put_chunks(matrix: RowMatrix, columns_held: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """`chunks` where heavy steps compute."""
    for start, rows in chunks(matrix, columns_held, _room()):
        yield start, put(rows)


def is_randomised(shape: tuple[int, int], rank: int) -> bool:
    """True if `truncated_svd` takes the randomised route for this shape and rank."""
    return min(shape) > SMALL_SIDE and (rank + OVERSAMPLING) * 4 <= min(shape)


def svd_memory_bytes(shape: tuple[int, int], rank: int) -> int:
    """Peak memory of `truncated_svd` beside the matrix itself, where it computes."""
    o, i = shape
    if is_randomised(shape, rank):
        return 8 * (rank + OVERSAMPLING) * 2 * (o + i) + 4 * _room()
    return 5 * 8 * min(shape) ** 2 + 12 * rank * (o + i) + 4 * _room()


def truncated_svd(matrix: RowMatrix, rank: int, key: int) -> Factors:
    """The `rank` leading singular triplets of an o x i matrix. `key` seeds the randomised route.

    Signs are fixed (the largest entry of each column of V is positive), so that the result is one.
    Components whose singular value is zero to working precision are left out. It lies where a
    `DenseMatrix` does, else on the CPU.
    """
    home = matrix.values.device if isinstance(matrix, DenseMatrix) else torch.device("cpu")
    rank = min(rank, *matrix.shape)
    near = _near(matrix)
    made = _settled(*_triplets(near, rank, key, wide()), home)
    if wide() != torch.float64 and not _is_orthonormal(made):
        place().count("again_in_fp64")
        made = _settled(*_triplets(near, rank, key, torch.float64), home)
    return made


def truncated_svds(matrices: Sequence[RowMatrix], rank: int, keys: Sequence[int]) -> list[Factors]:
    """`truncated_svd` of matrices of one shape, in batched calls where a GPU computes.

    All are held at once, with what `svd_memory_bytes` says for each. Results are those of one by one
    up to rounding.
    """
    if len(matrices) == 1 or not place().batched:
        return [truncated_svd(each, rank, key) for each, key in zip(matrices, keys, strict=True)]
    o, i = matrices[0].shape
    rank = min(rank, o, i)
    stack = torch.stack([put(each.rows(0, o)) for each in matrices])
    batch = _batched_triplets(stack, rank, keys, wide())
    del stack
    found = []
    home = torch.device("cpu")
    for matrix, key, u, s, v in zip(matrices, keys, *batch, strict=True):
        made = _settled(u, s, v, home)
        if wide() != torch.float64 and not _is_orthonormal(made):
            place().count("again_in_fp64")
            made = _settled(*_triplets(matrix, rank, key, torch.float64), home)
        found.append(made)
    return found


Triplets: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"


def _near(matrix: RowMatrix) -> RowMatrix:
    """The matrix held where it is worked on, if that is a GPU with room for it; else as it is."""
    free = free_bytes()
    o, i = matrix.shape
    if free is None or 4 * o * i > free // HELD_SHARE:
        return matrix
    return DenseMatrix(torch.cat([rows for _, rows in _put_chunks(matrix)]))


def _settled(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, home: torch.device) -> Factors:
    """Components that are not zero, with their signs fixed, fp32."""
    keep = s > s[0] * 1e-7 if len(s) and float(s[0]) > 0 else torch.zeros_like(s, dtype=torch.bool)
    u, s, v = u[:, keep.to(u.device)], s[keep], v[:, keep]
    sign = torch.ones_like(s)
    if len(s):
        peak = v.abs().argmax(dim=0)
        at = torch.arange(len(s), device=s.device, dtype=torch.int64)
        sign = torch.where(v[peak, at] < 0, -1.0, 1.0).to(s.dtype)
    u = (u * sign.to(u.device, u.dtype)).float()
    v = (v * sign).float()
    return Factors(u.to(home), s.float().to(home), v.to(home))


def _is_orthonormal(factors: Factors) -> bool:
    """True if the columns of U and of V are, to one step of the 16 bits that are stored."""
    for columns in (put(factors.u), put(factors.v)):
        gap = columns.T @ columns - torch.eye(
            columns.shape[1], device=columns.device, dtype=columns.dtype
        )
        if gap.numel() and not float(gap.abs().max()) <= SKEW:
            return False
    return True


def _triplets(matrix: RowMatrix, rank: int, key: int, dtype: torch.dtype) -> Triplets:
    """U (o x r), s, V (i x r) where heavy steps compute; a tall U in fp32."""
    if is_randomised(matrix.shape, rank):
        return _randomised(matrix, rank, key, dtype)
    if matrix.shape[0] >= matrix.shape[1]:
        return _tall_gram(matrix, rank, dtype)
    return _wide_gram(matrix, rank, dtype)


def _eigh_descending(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(roots of the eigenvalues, eigenvectors), the `rank` largest, of a matrix or of each of many."""
    values, vectors = torch.linalg.eigh(gram)
    roots = values.flip(-1)[..., :rank].clamp_min(0).sqrt()
    return roots, vectors.flip(-1)[..., :rank].contiguous()


def _divisor(s: torch.Tensor) -> torch.Tensor:
    """s to divide by, never 0; components that are 0 are left out later."""
    return s.clamp_min(1e-300 if s.dtype == torch.float64 else 1e-30)


def _project(matrix: RowMatrix, right: torch.Tensor) -> torch.Tensor:
    """D right, in its dtype, a chunk of rows at a time. right: i x r -> o x r."""
    out = torch.empty(matrix.shape[0], right.shape[1], dtype=right.dtype, device=right.device)
    for start, rows in _put_chunks(matrix, right.shape[1]):
        torch.mm(rows.to(right.dtype), right, out=out[start : start + len(rows)])
    return out


def _project_back(matrix: RowMatrix, left: torch.Tensor) -> torch.Tensor:
    """D^T left, in its dtype. left: o x r -> i x r."""
    out = torch.zeros(matrix.shape[1], left.shape[1], dtype=left.dtype, device=left.device)
    for start, rows in _put_chunks(matrix, left.shape[1]):
        out.addmm_(rows.to(left.dtype).T, left[start : start + len(rows)])
    return out


def _tall_gram(matrix: RowMatrix, rank: int, dtype: torch.dtype) -> Triplets:
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=dtype, device=here())
    for _, rows in _put_chunks(matrix):
        each = rows.to(dtype)
        gram.addmm_(each.T, each)
    s, v = _eigh_descending(gram, rank)
    del gram
    # float32, and in the CPU's memory: o can be a vocabulary
    u = torch.empty(matrix.shape[0], s.shape[0], dtype=torch.float32, device="cpu")
    scaled = v / _divisor(s)
    for start, rows in _put_chunks(matrix, len(s)):
        u[start : start + len(rows)] = (rows.to(dtype) @ scaled).float()
    return u, s, v


def _wide_gram(matrix: RowMatrix, rank: int, dtype: torch.dtype) -> Triplets:
    o = matrix.shape[0]
    gram = torch.empty(o, o, dtype=dtype, device=here())
    held = put(matrix.rows(0, o))
    for start in range(0, o, step := rows_at_once(matrix.shape[1], _room())):
        left = held[start : start + step].to(dtype)
        for begin in range(0, start + len(left), step):
            block = left @ held[begin : begin + step].to(dtype).T
            gram[start : start + len(left), begin : begin + block.shape[1]] = block
            gram[begin : begin + block.shape[1], start : start + len(left)] = block.T
    s, u = _eigh_descending(gram, rank)
    del gram, held
    return u, s, _project_back(matrix, u / _divisor(s))


def _randomised(matrix: RowMatrix, rank: int, key: int, dtype: torch.dtype) -> Triplets:
    width = min(rank + OVERSAMPLING, *matrix.shape)
    sketch = put(torch.from_numpy(gaussian(key, matrix.shape[1], width)), dtype)
    for _ in range(POWER_STEPS):
        left = torch.linalg.qr(_project(matrix, sketch)).Q
        sketch = torch.linalg.qr(_project_back(matrix, left)).Q
    left = torch.linalg.qr(_project(matrix, sketch)).Q
    back = _project_back(matrix, left)  # i x width; D ~ left back^T
    s, small = _eigh_descending(back.T @ back, rank)
    return left @ small, s, back @ small / _divisor(s)


def _batched_triplets(
    stack: torch.Tensor, rank: int, keys: Sequence[int], dtype: torch.dtype
) -> Triplets:
    """`_triplets` of n matrices in one tensor (n, o, i): U (n, o, r), s (n, r), V (n, i, r)."""
    _, o, i = stack.shape
    held = stack.to(dtype)
    turned = held.mT
    if is_randomised((o, i), rank):
        width = min(rank + OVERSAMPLING, o, i)
        drawn = torch.stack([torch.from_numpy(gaussian(key, i, width)) for key in keys])
        sketch = put(drawn, dtype)
        for _ in range(POWER_STEPS):
            left = torch.linalg.qr(held @ sketch).Q
            sketch = torch.linalg.qr(turned @ left).Q
        left = torch.linalg.qr(held @ sketch).Q
        back = turned @ left
        s, small = _eigh_descending(back.mT @ back, rank)
        return left @ small, s, back @ small / _divisor(s)[:, None]
    if o >= i:
        s, v = _eigh_descending(turned @ held, rank)
        return held @ (v / _divisor(s)[:, None]), s, v
    s, u = _eigh_descending(held @ turned, rank)
    return u, s, turned @ (u / _divisor(s)[:, None])


def noise_edge(shape: tuple[int, int], squared_norm: float) -> float:
    """Largest singular value to expect of a matrix of independent noise with this squared norm.

    The Marchenko-Pastur edge sigma (sqrt(o) + sqrt(i)), with sigma^2 = squared_norm / (o i). A delta
    none of whose singular values rises above it has a flat spectrum: no low-rank part to keep.
    """
    o, i = shape
    return float(np.sqrt(squared_norm / max(1, o * i)) * (np.sqrt(o) + np.sqrt(i)))
