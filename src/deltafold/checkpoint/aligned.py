"""A base seen under the fine-tune's names: each tensor is rows of one or several of the base's.

A wrapper has put a prefix before every name, experts lie fused in one tensor where the base has one
each, a head is tied in the base: the values are there, elsewhere. What reads a base by the
fine-tune's names reads this in its place and need not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from deltafold.checkpoint.header import TensorInfo
from deltafold.checkpoint.view import Checkpoint
from deltafold.lazy import torch

Segment = tuple[str, int, int]
"""Rows [start, stop) of the tensor of this name, seen as a matrix."""


class AlignedCheckpoint(Checkpoint):
    """`origin`, where each of `sources` is made of the segments named, one after the other.

    Other tensors of the origin keep their names, but for those that a source has taken.
    """

    def __init__(self, origin: Checkpoint, sources: Mapping[str, tuple[Segment, ...]]):
        self.__dict__.update(origin.__dict__)  # path, label, shards, open files
        self.origin = origin
        self.sources = dict(sources)
        self.tensors = dict(origin.tensors)
        self.tensors |= {name: _joined(origin, name, each) for name, each in sources.items()}

    def __reduce__(self) -> tuple[Callable[..., Checkpoint], Any]:
        return _aligned_elsewhere, (self.origin, tuple(self.sources.items()))

    def fingerprint(self) -> str:
        """That of the origin, and how it is put together."""
        made_of = repr(sorted(self.sources.items()))
        return hashlib.sha256((self.origin.fingerprint() + made_of).encode()).hexdigest()[:32]

    def close(self) -> None:
        self.origin.close()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (stop - start, columns) of a tensor: see `Checkpoint.rows`."""
        segments = self.sources.get(name)
        if segments is None:
            return self.origin.rows(name, start, stop)
        n_rows = self.tensors[name].matrix_shape[0]
        if not 0 <= start <= stop <= n_rows:
            raise ValueError(f"tensor {name} has {n_rows} rows, not {start} to {stop}")
        found, at = [self.origin.rows(segments[0][0], 0, 0)], 0
        for source, first, end in segments:
            low, high = max(start, at), min(stop, at + end - first)
            if low < high:
                found.append(self.origin.rows(source, first + low - at, first + high - at))
            at += end - first
        return found[-1] if len(found) <= 2 else torch.cat(found)


def _joined(origin: Checkpoint, name: str, segments: tuple[Segment, ...]) -> TensorInfo:
    """The header of a tensor made of segments: a whole tensor keeps its shape, else a matrix."""
    first, start, stop = segments[0]
    info = origin.tensors[first]
    if len(segments) == 1 and (start, stop) == (0, info.matrix_shape[0]):
        return replace(info, name=name)
    n_rows = sum(stop - start for _, start, stop in segments)
    columns = info.elements // max(
        1, info.matrix_shape[0]
    )  # values, of which a byte may hold several
    return replace(info, name=name, shape=(n_rows, columns))


def fits_together(origin: Checkpoint, segments: Iterable[Segment]) -> bool:
    """Whether the base has these rows, all of one dtype and of as many columns."""
    kinds = set()
    for name, start, stop in segments:
        info = origin.tensors.get(name)
        if info is None or not 0 <= start <= stop <= info.matrix_shape[0]:
            return False
        kinds.add((info.dtype, info.matrix_shape[1]))
    return len(kinds) == 1


@cache
def _aligned_elsewhere(
    origin: Checkpoint, sources: tuple[tuple[str, tuple[Segment, ...]], ...]
) -> AlignedCheckpoint:
    """An aligned base that came pickled from another process."""
    return AlignedCheckpoint(origin, dict(sources))
