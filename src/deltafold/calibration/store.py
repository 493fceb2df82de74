"""Hidden states between blocks: in memory while they fit an allowance, else in a file.

Where a GPU computes they stay in its memory, if they are a small part of what is free there.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from deltafold.checkpoint import tensor_bytes
from deltafold.checkpoint.writer import guard_storage
from deltafold.running.devices import free_bytes, here

Shape = tuple[int, ...]
GPU_SHARE = 4  # one in so many bytes that are free there, for one store


class TensorStore:
    """fp32 tensors of known shapes, read and written by number; closing it frees the file.

    A file is read and written plainly, not mapped: mapped pages would count as this process's
    memory. It has no name, so that nothing is left behind however the process ends.
    """

    def __init__(self, shapes: Sequence[Shape], allowance_bytes: int, folder: Path | None = None):
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [4 * math.prod(shape) for shape in self.shapes]
        self.n_bytes = sum(sizes)
        free = free_bytes()
        on_gpu = free is not None and self.n_bytes <= free // GPU_SHARE
        self.device = here() if on_gpu else torch.device("cpu")
        self.on_disk = not on_gpu and self.n_bytes > allowance_bytes
        self._held: list[torch.Tensor | None] = [None] * len(shapes)
        self._starts = list(accumulate(sizes, initial=0))
        self._place = folder or Path(tempfile.gettempdir())
        if self.on_disk:
            self._file = guard_storage(self._place, self._open)

    def _open(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._place)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def held_bytes(self) -> int:
        """What it may take of the CPU's memory."""
        return 0 if self.on_disk or self.device.type != "cpu" else self.n_bytes

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything. Closing twice does no harm."""
        self._held = [None] * len(self.shapes)
        if self.on_disk:
            self._file.close()

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) != self.shapes[number]:
            raise ValueError(f"place {number} is for {self.shapes[number]}, not {tensor.shape}")
        kept = tensor.detach().to(self.device, torch.float32)
        if not self.on_disk:
            self._held[number] = kept
            return
        data, start = tensor_bytes(kept), self._starts[number]
        guard_storage(self._place, lambda: self._write(data, start))

    def _write(self, data: memoryview, start: int) -> None:
        while data:
            count = os.pwrite(self._file.fileno(), data, start)
            data, start = data[count:], start + count

    def __getitem__(self, number: int) -> torch.Tensor:
        """The tensor as it was stored, on the CPU. What is given is not to be changed in place."""
        return self.near(number).cpu()

    def near(self, number: int) -> torch.Tensor:
        """The tensor in its stored shape and dtype, where it lies."""
        if not self.on_disk:
            held = self._held[number]
            if held is None:
                raise ValueError(f"place {number} is empty")
            return held
        whole = torch.empty(self.shapes[number])
        data, start = tensor_bytes(whole), self._starts[number]
        while data:
            count = os.preadv(self._file.fileno(), [data], start)
            if not count:
                raise ValueError(f"place {number} is empty")
            data, start = data[count:], start + count
        return whole
