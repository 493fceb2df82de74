"""torch as it is when a program starts, whatever the caller has set: so that bits never depend on it.

Loaders set the default dtype to bf16 while they build a model, others build under
`torch.device("meta")` or with a GPU as the default device, in inference mode, under autocast. Each of
these changes what `torch.zeros(3)` or an integer divided by 2 is, without a sign. So codecs, decoding,
tasks of the engine and whole verbs run inside `neutral()`, which puts back what it found.

Two kinds of state. What belongs to a thread (default device, gradients, inference mode, autocast,
flushing of denormals) is set for the thread that computes; a new thread starts without the caller's
device. What belongs to the process (default dtype, precision of fp32 products) is set while anyone is
inside: the last to leave puts it back, so that threads cannot undo one another.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from deltafold.errors import UsageError

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

_DENORMAL = 1e-39


class _Process:
    """The process's settings, and who is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: Counter[int] = Counter()
        self._owed: tuple[torch.dtype, str] | None = None

    def enter(self) -> tuple[torch.dtype, str] | None:
        """Set what is neutral; returns what was there, if it was something else."""
        import torch

        with self._lock:
            self._inside[threading.get_ident()] += 1
            found = (torch.get_default_dtype(), torch.get_float32_matmul_precision())
            if found == (torch.float32, "highest"):
                return None
            self._set(torch.float32, "highest")
            return found

    def leave(self, found: tuple[torch.dtype, str] | None) -> None:
        """Put back what `enter` found, now or when the last other thread leaves."""
        me = threading.get_ident()
        with self._lock:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
            if any(thread != me for thread in self._inside):
                self._owed = self._owed or found
                return
            if not self._inside and self._owed is not None:
                found, self._owed = found or self._owed, None
            if found is not None:
                self._set(*found)

    @staticmethod
    def _set(dtype: torch.dtype, precision: str) -> None:
        import torch

        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


_PROCESS = _Process()


@contextmanager
def neutral(grad: bool = False) -> Iterator[None]:
    """Inside, torch is as at its start, on the CPU; with gradients only if asked. Put back afterwards.

    Raises UsageError where torch's own functions have been replaced, so that nothing helps.
    """
    import torch

    found = _PROCESS.enter()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
            if torch.empty(0).device.type != "cpu":
                stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            _check(torch.empty(0, dtype=torch.float32, device="cpu"))
            small = torch.full((1,), _DENORMAL, dtype=torch.float32, device="cpu")
            if not float(small * 1):
                torch.set_flush_denormal(False)
                stack.callback(torch.set_flush_denormal, True)
            yield
    finally:
        _PROCESS.leave(found)


def _check(made: torch.Tensor) -> None:
    import torch

    if type(made) is not torch.Tensor or made.device.type != "cpu":
        raise UsageError(
            "torch makes no real tensors here: something (such as accelerate's init_empty_weights, "
            "or a fake tensor mode) has replaced its functions; call deltafold outside of it."
        )


def as_at_start() -> AbstractContextManager[None]:
    """For a verb: all of it runs inside `neutral`, gradients allowed for what trains.

    Where torch is not imported yet nobody can have set anything, and it need not be.
    """
    return neutral(grad=True) if "torch" in sys.modules else nullcontext()


def with_values() -> AbstractContextManager[object]:
    """For building a model with its weights: on the CPU where the caller's default device is `meta`.

    Any other default device is the caller's choice of where the model shall be.
    """
    import torch

    return torch.device("cpu") if torch.empty(0).is_meta else nullcontext()


def undisturbed(function: Callable[P, T]) -> Callable[P, T]:
    """For a function that codes or decodes: it runs inside `neutral`.

    Of a generator each step does, and the state is the caller's again in between.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with neutral():
            found = function(*args, **kwargs)
        return _steps(found) if isinstance(found, Generator) else found  # type: ignore[return-value]

    return run


def _steps(rows: Generator[T, None, None]) -> Iterator[T]:
    try:
        while True:
            with neutral():
                try:
                    found = next(rows)
                except StopIteration:
                    return
            yield found
    finally:
        rows.close()
