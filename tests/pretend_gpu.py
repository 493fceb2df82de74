"""A GPU that is none: tensors say that they lie on it, refuse what lies elsewhere, and are computed.

On a machine without a GPU every mistake of placing would go unseen: what should have been moved and
was not, what is made on the CPU and meets a tensor of the GPU. Here such a meeting raises an error,
as it does on a real one. Arithmetic is the CPU's, so results are those of the CPU.

Not seen here: streams, memory, kernels that a GPU has and a CPU has not, and their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from deltafold.running import devices

NAME = "pretend:0"
MOVES = {"_to_copy", "copy_", "_copy_from"}
BY_INDEX = {"index", "index_put", "index_put_"}  # torch moves indices by itself
# Now, when tests are collected: torch runs no backward pass on a device that comes after the first one.
# It stays for the process. Autocast asks it; and with it no fork can run a backward pass after one.
_setup_privateuseone_for_python_backend("pretend")
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]


class OnGpu(torch.Tensor):
    """A tensor of the CPU (`inner`) that says it lies on the pretended GPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME), requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner!r})"

    # Where a tensor's memory lies tells whose parameter it is: that of what is inside.
    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """While active, tensors can be made on the pretended GPU and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given = list(_tensors((args, kwargs)))
    on_gpu = any(isinstance(t, OnGpu) for t in given)
    elsewhere = [t for t in given if not isinstance(t, OnGpu) and t.dim()]
    if on_gpu and elsewhere and name not in MOVES | BY_INDEX:
        raise RuntimeError(f"{name}: tensors on two devices, {NAME} and {elsewhere[0].device}")
    if on_gpu and name in BY_INDEX and not isinstance(args[0], OnGpu):
        raise RuntimeError(f"{name}: indices on {NAME} for a tensor on the CPU")
    if name == "_fused_sdp_choice":
        return 0  # the plain formula: fused kernels are of a device
    if name == "_local_scalar_dense" or (not given and "device" not in kwargs):
        return func(*_inner(args), **kwargs)
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == torch.device(NAME).type:
        kwargs, on_gpu = kwargs | {"device": torch.device("cpu")}, True
    elif asked is not None:
        on_gpu = False
    made = func(*_inner(args), **_inner(kwargs))
    if name.endswith("_") and not name.endswith("__"):  # in place
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return _outer(made) if on_gpu else made


# Arguments of torch's operations are tensors, numbers, and lists of them: torch's own walk through any
# structure takes longer than the operations do.
def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _inner(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.inner
    if type(value) in (list, tuple):
        return type(value)(map(_inner, value))
    return {key: _inner(each) for key, each in value.items()} if type(value) is dict else value


def _outer(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return OnGpu(value)
    if isinstance(value, (list, tuple)):  # of torch's own kinds, too: those are read by position
        return tuple(map(_outer, value)) if isinstance(value, tuple) else list(map(_outer, value))
    return value


@contextmanager
def pretending(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """`--device cuda` means the pretended GPU inside, of this compute capability."""
    real = devices.resolve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "resolve", lambda asked: NAME if asked == "cuda" else real(asked))
        patch.setattr(devices, "_on", lambda chosen: Pretend() if chosen.is_gpu else _nothing())
        patch.setattr(devices, "_stream", lambda chosen: _nothing())
        patch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda name: "Pretended GPU")
        patch.setattr(torch.cuda, "mem_get_info", lambda name: (1 << 32, 1 << 33))
        patch.setattr(torch.cuda, "memory_reserved", lambda name: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda name: 0)
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
