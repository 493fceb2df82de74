"""Sums over the inputs of every matrix, taken while a module runs.

A matrix is recognised where it is used: every product `x W^T` passes a switch of torch, and the
memory of W tells whose parameter it is, and which expert of it. So layers of any class are seen,
and so are experts that share one parameter. Matrices that are given the very same x share one entry:

    q_proj, k_proj, v_proj -> entry 0        gate_proj, up_proj -> entry 2
    o_proj                 -> entry 1        down_proj          -> entry 3
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deltafold.linalg.matrices import Moments

Name = Callable[[str, int], tuple[str, ...]]
"""(parameter, number of the expert in it) -> the checkpoint tensors whose inputs these are."""


BUFFER_ROWS = 2048
"""Inputs gathered before they are multiplied: small batches one by one would be slow."""


class Sums:
    """Sums of x x^T (i, i), or of its diagonal (i,), and of x (i,), in float64.

    Products are fp32, of up to `BUFFER_ROWS` inputs at a time; their sums are float64.
    """

    def __init__(self, i: int, full: bool, device: torch.device):
        self.second = torch.zeros((i, i) if full else (i,), dtype=torch.float64, device=device)
        self.first = torch.zeros(i, dtype=torch.float64, device=device)
        self.tokens = 0
        self._buffer = torch.empty(min(i, BUFFER_ROWS) if full else 0, i, device=device)
        self._filled = 0

    @property
    def full(self) -> bool:
        return self.second.dim() == 2

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs (n, i)."""
        rows = inputs.float()
        self.first += rows.sum(0, dtype=torch.float64)
        self.tokens += len(rows)
        if not self.full:
            self.second += rows.square().sum(0, dtype=torch.float64)
        while self.full and len(rows):
            part = rows[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled, rows = self._filled + len(part), rows[len(part) :]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        rows = self._buffer[: self._filled]
        self.second += rows.T @ rows
        self._filled = 0

    def moments(self) -> Moments:
        """Means over all tokens, fp32. The sums are used up."""
        if self._filled:
            self._flush()
        n = max(1, self.tokens)
        return Moments(self.second.div_(n).float().cpu(), (self.first / n).float().cpu(), n)


def full_bytes(i: int) -> int:
    """Memory that a full second moment of i inputs takes: its sum, a product, gathered inputs."""
    return 12 * i * i + 4 * i * min(i, BUFFER_ROWS)


@dataclass
class Entries:
    """Sums of one module, and the entry of every checkpoint tensor.

    Full second moments are kept while `allowance_bytes` lasts, in the order in which matrices are
    used; then diagonals.
    """

    full: bool
    allowance_bytes: int
    sums: list[Sums] = field(default_factory=list)
    of_tensor: dict[str, int] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)  # of the stored matrix, along the inputs
    of_matrix: dict[tuple[str, int], int] = field(default_factory=dict)

    def new(self, inputs: torch.Tensor) -> int:
        """A new entry for inputs (.., i) of this width."""
        i = inputs.shape[-1]
        full = self.full and full_bytes(i) <= self.allowance_bytes
        if full:
            self.allowance_bytes -= full_bytes(i)
        self.sums.append(Sums(i, full, inputs.device))
        return len(self.sums) - 1


class Products(TorchFunctionMode):
    """While active, sees every product of the watched parameters' matrices.

    `name` says which checkpoint tensors a matrix comes from. Subclasses do something with `seen` and
    `made`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], name: Name):
        super().__init__()
        self.name = name
        self._owner = {
            parameter.untyped_storage().data_ptr(): (path, parameter)
            for path, parameter in parameters.items()
            if parameter.dim() > 1 and parameter.numel()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            inputs, weight, axis = *_arguments(args, kwargs, ("input", "weight")), 1
        elif func is torch.addmm:  # GPT-2's layers: x W with W stored i x o
            inputs, weight, axis = *_arguments(args[1:], kwargs, ("mat1", "mat2")), 0
        else:
            return func(*args, **kwargs)
        found = self._owner.get(weight.untyped_storage().data_ptr())
        if found is None or weight.dim() != 2 or weight.shape[axis] != inputs.shape[-1]:
            return func(*args, **kwargs)
        path, parameter = found
        expert = weight.storage_offset() // weight.numel() if parameter.dim() == 3 else 0
        names = self.name(path, expert)
        if names and inputs.numel():
            self.seen((path, expert), names, inputs, axis)
        if self.skips(path):
            return inputs.new_zeros(()).expand(*inputs.shape[:-1], weight.shape[0])
        output = func(*args, **kwargs)
        if names and inputs.numel():
            self.made(names, output, axis)
        return output

    def skips(self, path: str) -> bool:
        """True if nobody reads the products of this parameter: they are not computed."""
        return False

    def seen(
        self, matrix: tuple[str, int], names: tuple[str, ...], inputs: torch.Tensor, axis: int
    ) -> None:
        """Inputs (.., i) of a matrix (parameter, number of the expert), which run along `axis`."""

    def made(self, names: tuple[str, ...], output: torch.Tensor, axis: int) -> None:
        """Outputs (.., o) of a matrix."""


class Watch(Products):
    """Adds the inputs of the watched parameters' matrices to `entries`.

    `unused` are parameters whose products nobody reads.
    """

    def __init__(
        self,
        entries: Entries,
        parameters: Mapping[str, nn.Parameter],
        name: Name,
        unused: Collection[str] = (),
    ):
        super().__init__(parameters, name)
        self.entries, self.unused = entries, unused
        self._seen: dict[tuple[Any, ...], int] = {}
        self._held: list[torch.Tensor] = []  # memory of a seen input must not be used again

    def skips(self, path: str) -> bool:
        return path in self.unused

    def seen(
        self, matrix: tuple[str, int], names: tuple[str, ...], inputs: torch.Tensor, axis: int
    ) -> None:
        self._add(inputs, matrix, names)
        self.entries.axes |= dict.fromkeys(names, axis)

    def _add(self, inputs: torch.Tensor, matrix: tuple[str, int], names: tuple[str, ...]) -> None:
        width = inputs.shape[-1]
        # The same memory, unchanged since: a reshaped input is the same input.
        same = (inputs.data_ptr(), inputs.numel(), width, inputs.is_contiguous(), inputs._version)
        entry = self.entries.of_matrix.get(matrix)
        if entry is None:
            # One tensor may hold several matrices (experts that are stored together).
            entry = self.entries.of_tensor.get(names[0], self._seen.get(same))
            entry = self.entries.new(inputs) if entry is None else entry
            self.entries.of_matrix[matrix] = entry
            self.entries.of_tensor |= dict.fromkeys(names, entry)
        if self._seen.get(same) == entry:
            return
        self._seen[same] = entry
        self._held.append(inputs)
        self.entries.sums[entry].add(inputs.detach().reshape(-1, width))


def _arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, str]
) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (
        args[place] if place < len(args) else kwargs[name] for place, name in enumerate(names)
    )
    return first, second
