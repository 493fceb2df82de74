"""Where heavy steps compute: on the CPU, or on a GPU that was asked for.

    verb -> computing("cuda") -> threads of the engine -> decomposition, whitening, text: here(), put()

The place is a context variable, not an argument: what a codec or a rule computes is one thing, where
it is computed another, as is the number of threads. The engine hands it on to its threads, each of
which has a stream of its own on a GPU, so that one reads while another computes. On the CPU every
function here does nothing, and no byte changes.

Precision is chosen by step. Linear algebra is fp64 where the GPU has fp64 units to speak of, else
fp32 with a check (see `decomposition`); fp32 products never are TF32. Text may run in bf16 where it only
weighs (see `calibration/precision.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from deltafold.errors import DeviceError, UsageError
from deltafold.foreign import gpu_full
from deltafold.running.neutral import neutral

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

CPU, CUDA, AUTO = "cpu", "cuda", "auto"
FULL_FP64 = {(6, 0), (7, 0), (8, 0), (9, 0), (9, 4), (10, 0)}
"""Compute capabilities whose fp64 is half as fast as fp32, not a 32nd or less: P100, V100, A100,
H100, B200; MI200 and MI300 under ROCm."""
UNSTEADY = "DELTAFOLD_UNSTEADY"
"""Set in the environment, backward passes may add in any order."""
TASKS_SHARE = 0.8
"""Of the GPU's free memory that tasks may hold together; the rest is for libraries' own buffers."""


@dataclass
class Place:
    """A device by its name (`cpu`, `cuda:0`), and what was noted of the work there.

    `asked` is False only where nobody named a device. `wide` is the dtype of linear algebra, and
    `text_bf16` says whether text may run in bf16 (where the weights are bf16, and it is checked).
    """

    name: str = CPU
    asked: bool = False
    wide: str = "float64"
    text_bf16: bool = False
    batched: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU

    def note(self, key: str, value: Any) -> None:
        """Something that the record shall say of the work."""
        with self.lock:
            self.notes[key] = value

    def count(self, key: str) -> None:
        """One more of a thing that the record counts."""
        with self.lock:
            self.notes[key] = self.notes.get(key, 0) + 1


_PLACE: ContextVar[Place] = ContextVar("place", default=Place())  # noqa: B039 (a place without a name)
_STREAMS = threading.local()


def resolve(asked: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> `cpu` or `cuda:N`. Raises UsageError if it is not there.

    >>> resolve("cpu")
    'cpu'
    """
    import torch

    kind, _, number = asked.partition(":")
    known = asked in (AUTO, CPU, CUDA) or (kind == CUDA and number.isdecimal())
    if not known:
        raise UsageError(f"There is no device {asked!r}; give auto, cpu, cuda or cuda:N.")
    if asked == CPU or (asked == AUTO and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise UsageError("This machine has no CUDA device that torch can use; give --device cpu.")
    if not number:
        return f"{CUDA}:{torch.cuda.current_device()}"
    count = torch.cuda.device_count()
    if int(number) >= count:
        raise UsageError(
            f"This machine has no {asked}: its CUDA devices are numbered from 0 to {count - 1}; "
            "give one of them."
        )
    return f"{CUDA}:{int(number)}"


def place() -> Place:
    """Where this thread computes, and what is noted of it."""
    return _PLACE.get()


@contextmanager
def computing(asked: str | None) -> Iterator[Place]:
    """Heavy steps compute on this device inside; None: where they did before, at first the CPU.

    Raises UsageError for a device that is not there; DeviceError where its memory is not enough.
    """
    if asked is None:
        yield place()
        return
    chosen = _described(resolve(asked))
    token = _PLACE.set(chosen)
    try:
        with steady() if chosen.is_gpu else nullcontext(), _on(chosen), one_sentence(chosen):
            if chosen.is_gpu:
                _load_solvers()
            yield chosen
    finally:
        _PLACE.reset(token)


def _described(name: str) -> Place:
    if name == CPU:
        return Place(CPU, True)
    import torch

    full = torch.cuda.get_device_capability(name) in FULL_FP64
    return Place(name, True, "float64" if full else "float32", True, True)


def _load_solvers() -> None:
    """torch loads its GPU solvers when they are first asked for: in several threads at once that fails."""
    import torch

    torch.linalg.cholesky(torch.eye(2, device=here()))


def for_another_thread(run: Callable[[], T], tensors: bool = True) -> Callable[[], T]:
    """`run`, to be called in another thread: it computes on this thread's device, on its own stream.

    With `tensors` torch has its initial settings there; that gradients are switched off here is not
    passed on.
    """
    context, chosen = copy_context(), place()

    def inside() -> T:
        with neutral(grad=True) if tensors else nullcontext(), _on(chosen), _stream(chosen):
            return run()

    return lambda: context.run(inside)


def here() -> torch.device:
    """The device that heavy steps of this thread compute on."""
    import torch

    return torch.device(place().name)


def wide() -> torch.dtype:
    """The dtype of linear algebra here."""
    import torch

    return torch.float64 if place().wide == "float64" else torch.float32


def put(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor, of any shape, where heavy steps compute, in `dtype` (its own if None).

    On the CPU it is only converted. To a GPU it travels in its own dtype and is converted there; from
    pinned memory, so that the copy runs beside what the GPU computes.
    """
    at = here()
    if tensor.device != at:
        tensor = _sent(tensor, at)
    return tensor if dtype is None else tensor.to(dtype)


def _sent(tensor: torch.Tensor, at: torch.device) -> torch.Tensor:
    if at.type != CUDA or tensor.device.type != CPU:
        return tensor.to(at)
    return tensor.contiguous().pin_memory().to(at, non_blocking=True)


def free_bytes() -> int | None:
    """Memory of the GPU that is free now, as the driver and torch's cache have it; None on the CPU."""
    chosen = place()
    if not chosen.is_gpu:
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(chosen.name)
    cached = torch.cuda.memory_reserved(chosen.name) - torch.cuda.memory_allocated(chosen.name)
    return int(free) + int(cached)


def task_bytes() -> int | None:
    """Memory of the GPU that tasks may hold together; None on the CPU."""
    free = free_bytes()
    return None if free is None else int(TASKS_SHARE * free)


def total_bytes(device: torch.device) -> int:
    """All memory of a GPU, free or not: on one kind of GPU always the same."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def fitting(room_bytes: int, each_bytes: float, least: int, most: int) -> int:
    """`least` doubled as long as that many fit, and are no more than `most`.

    >>> [fitting(room << 30, 1.5e6, 1024, 16384) for room in (1, 20, 1000)]
    [1024, 8192, 16384]
    """
    found = least
    while 2 * found <= most and 2 * found * each_bytes <= room_bytes:
        found *= 2
    return found


def identity() -> dict[str, str]:
    """What unfinished work and kept measurements are bound to: nothing on the CPU.

    A GPU sums in another order, and so may round differently.
    """
    chosen = place()
    return {"device": f"{_model(chosen)}, {chosen.wide}"} if chosen.is_gpu else {}


def label() -> str:
    """`cpu`, or the GPU as its maker calls it, with its name here."""
    chosen = place()
    return f"{_model(chosen)} ({chosen.name})" if chosen.is_gpu else CPU


def to_record() -> dict[str, Any] | None:
    """What a record says of work on a GPU: which one, and what was chosen there; None on the CPU."""
    chosen = place()
    if not chosen.is_gpu:
        return None
    with chosen.lock:
        return {
            "name": chosen.name, "model": _model(chosen), "linear_algebra": chosen.wide,
            **chosen.notes,
        }  # fmt: skip


def _model(chosen: Place) -> str:
    import torch

    return str(torch.cuda.get_device_name(chosen.name))


def _on(chosen: Place) -> AbstractContextManager[object]:
    if not chosen.is_gpu:
        return nullcontext()
    import torch

    return torch.cuda.device(chosen.name)


def _stream(chosen: Place) -> AbstractContextManager[object]:
    """A stream of this thread's own; it waits for what was begun before the task.

    Results leave a task through the CPU's memory, whose copies wait for the stream.
    """
    if not chosen.is_gpu:
        return nullcontext()
    import torch

    streams: dict[str, torch.cuda.Stream] = _STREAMS.__dict__.setdefault("by_device", {})
    if chosen.name not in streams:
        streams[chosen.name] = torch.cuda.Stream(chosen.name)
    stream = streams[chosen.name]
    stream.wait_stream(torch.cuda.default_stream(chosen.name))
    return torch.cuda.stream(stream)


@contextmanager
def steady() -> Iterator[None]:
    """Sums in the same order each time, and fp32 products in fp32, not TF32; restored afterwards.

    Where torch has no such form of an operation it goes on without: see `steady_backward`.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    precision = torch.get_float32_matmul_precision()
    already = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its one setting is set as an attribute
    filled, cudnn = memory.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch's own attention has a steady backward pass
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(already, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


@contextmanager
def steady_backward() -> Iterator[None]:
    """A backward pass inside `steady`: attention, too, adds in the same order each time.

    torch's fast attention has a steady backward pass, and takes it only where nothing else is
    allowed. Raises DeviceError for a model that has no such pass.
    """
    import torch

    allowed = torch.is_deterministic_algorithms_warn_only_enabled()
    if not allowed or not torch.are_deterministic_algorithms_enabled() or os.environ.get(UNSTEADY):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        operation = str(error).partition(" does not")[0].split()[-1]
        raise DeviceError(
            f"On a GPU torch has no backward pass for this model that gives the same numbers each time "
            f"({operation}); give --device cpu, or set {UNSTEADY}=1 to accept numbers that vary."
        ) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def one_sentence(chosen: Place) -> Iterator[None]:
    """A GPU whose memory runs out becomes one sentence."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise gpu_full(chosen.name) from error
