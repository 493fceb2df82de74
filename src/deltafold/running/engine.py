"""Run per-tensor work over the cores of this machine, or over an engine of many machines.

Threads: everything heavy (linear algebra, hashing, zstd, file reads) releases the interpreter lock.
Each thread computes with one core, so that results do not depend on how many there are. A task is
admitted when its memory fits beside those that run; a task larger than the allowance runs alone.
Tasks compute where the caller does (`running/devices.py`), and then also share that device's memory.
Whatever torch is set to outside, a task finds it as at its start (`running/neutral.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from deltafold.lazy import torch
from deltafold.running.devices import for_another_thread, task_bytes
from deltafold.running.memory import total_memory_bytes


@dataclass(frozen=True)
class Task:
    """One unit of work. `work` weighs it in the progress bar; `memory_bytes` is its peak.

    What `run` returns, if a number, is the bytes it produced; results go to files. `run` may be called
    in another process, even on another machine, and again if that one is lost. A task whose work has
    no `tensors` in it does not want torch, so that it is not imported.
    """

    name: str
    run: Callable[[], object]
    memory_bytes: int = 0
    work: float = 1.0
    tensors: bool = True


@dataclass(frozen=True)
class Step:
    """A task has ended: how far the stage is, and the bytes it has produced so far."""

    stage: str
    name: str
    done: float
    total: float
    made_bytes: int


Progress = Callable[[Step], None]


class Engine(Protocol):
    """What runs a stage's tasks elsewhere; see `running/cluster.py`."""

    def run(self, stage: str, tasks: Sequence[Task], progress: Progress | None) -> None:
        """As `run_tasks`."""
        ...

    def to_record(self) -> dict[str, Any]:
        """What a run's record says of it."""
        ...


@dataclass(frozen=True)
class Resources:
    """What the work may use; it never changes the result. Without an `engine`: threads."""

    workers: int | None = None
    memory_bytes: int | None = None
    progress: Progress | None = None
    engine: Engine | None = None

    def run(self, stage: str, tasks: Sequence[Task]) -> None:
        """Run all tasks of a stage, see `run_tasks`."""
        if self.engine is None:
            run_tasks(stage, tasks, self.workers, self.memory_bytes, self.progress)
        else:
            self.engine.run(stage, tasks, self.progress)


def default_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_memory_bytes(workers: int | None = None) -> int:
    """Memory that tasks may hold together: half a gibibyte a worker, an eighth of the machine."""
    return max(256 << 20, min((workers or default_workers()) << 29, total_memory_bytes() // 8))


class Tally:
    """How far a stage is."""

    def __init__(self, stage: str, tasks: Sequence[Task], progress: Progress | None):
        self.stage, self.progress = stage, progress
        self.done, self.total, self.made_bytes = 0.0, sum(task.work for task in tasks), 0

    def ended(self, task: Task, result: object) -> None:
        """Count a task, and show it."""
        self.done += task.work
        self.made_bytes += result if isinstance(result, int) else 0
        if self.progress:
            self.progress(Step(self.stage, task.name, self.done, self.total, self.made_bytes))


def run_tasks(
    stage: str,
    tasks: Sequence[Task],
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run all tasks; return when all are done.

    On a failure no further task starts, those that run are waited for, and the error of the task
    that stands first in `tasks` is raised: the same one each time. Ctrl-C does likewise.
    """
    threads = workers or default_workers()
    allowance = memory_bytes or default_memory_bytes(threads)
    if (on_gpu := task_bytes()) is not None:  # most of what a task holds lies there
        allowance = min(memory_bytes or on_gpu, on_gpu)
    waiting = list(enumerate(tasks))
    tally = Tally(stage, tasks, progress)
    running: dict[Future[object], int] = {}
    errors: dict[int, BaseException] = {}
    tensors = any(task.tensors for task in tasks)
    with one_core_each(tensors), _pool(threads, tensors) as pool:
        try:
            while (waiting and not errors) or running:
                held = sum(tasks[index].memory_bytes for index in running.values())
                while waiting and not errors and len(running) < threads:
                    index, task = waiting[0]
                    if running and held + task.memory_bytes > allowance:
                        break
                    running[pool.submit(for_another_thread(task.run, task.tensors))] = index
                    held += task.memory_bytes
                    waiting.pop(0)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index = running.pop(future)
                    if (error := future.exception()) is not None:
                        errors[index] = error
                        continue
                    tally.ended(tasks[index], future.result())
                if done and tasks[index].memory_bytes > 64 << 20:
                    trim()
        except KeyboardInterrupt:
            wait(running)
            raise
    if errors:
        raise errors[min(errors)]


def spread(run: Callable[[int], None], count: int) -> None:
    """`run(n)` for n below `count`, one core each, so that the bits do not hang on their number.

    As many at a time as torch may use threads. The first error, by n, is raised.
    """
    workers = min(default_workers(), torch.get_num_threads(), count)
    with one_core_each():
        if workers <= 1:
            for number in range(count):
                run(number)
            return
        with _pool(workers) as pool:
            done = [
                pool.submit(for_another_thread(partial(run, number))) for number in range(count)
            ]
            try:
                for each in done:
                    each.result()
            finally:
                for each in done:
                    each.cancel()


@contextlib.contextmanager
def one_core_each(tensors: bool = True) -> Iterator[None]:
    """BLAS and torch compute with one thread inside, where there are tensors; restored afterwards."""
    if not tensors:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pool(workers: int, tensors: bool = True) -> ThreadPoolExecutor:
    def start() -> None:
        if tensors:  # a new thread has OpenMP settings of its own
            torch.set_num_threads(1)
        threading.current_thread().name = "deltafold"

    return ThreadPoolExecutor(max_workers=workers, initializer=start)


def trim() -> None:
    """Give freed memory back to the system (glibc keeps it per thread otherwise)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
