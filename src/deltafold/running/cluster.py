"""Tasks over a Ray cluster: what threads of one process do, done by processes of many machines.

    stage's tasks --pickled once--> object store --unpickled once by each worker process--> task n
                                                                                              |
    driver <-- bytes made, peak of memory -- result, by rename, in the shared workspace <----+

What a task refers to (checkpoints, archives, the workspace, a writer of weights) is pickled as a path
and opened again where the task runs, which fails by name if other files lie there. A worker process
computes with one core, so that the bytes are those of one process. Ray runs the tasks of a lost
worker again; whole results replace one another by rename, and rows of weights go where they were.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import platform
import resource
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from deltafold.errors import ClusterError, DeltafoldError, UsageError, nearest
from deltafold.foreign import blamed
from deltafold.running.devices import place
from deltafold.running.engine import Progress, Tally, Task, default_workers, trim
from deltafold.version import __version__

ENGINES = ["threads", "ray"]
PROCESS_BYTES = 400 << 20  # of a worker that has imported torch and does nothing
STORE_BYTES = 512 << 20  # of shared memory on this machine: stages' descriptions, no weights
MAX_RETRIES = 5  # of a task whose worker is lost
LOOK_SECONDS = 2.0  # between looks at the cluster
PATIENCE_SECONDS = 60.0  # how long to wait for a machine when there is none


def check_engine(name: str) -> None:
    """Raises UsageError for an engine that there is not, or that is not installed."""
    if name not in ENGINES:
        raise UsageError(f"There is no engine {name!r}; {nearest(name, ENGINES)}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray: pip install 'deltafold[ray]'.")


@contextlib.contextmanager
def open_engine(
    name: str, workers: int | None = None, memory_bytes: int | None = None
) -> Iterator[RayEngine | None]:
    """What runs tasks: None for this process's own threads, a Ray cluster for `ray`.

    The cluster is the one that RAY_ADDRESS names, else one that is started on this machine, with
    `workers` processes that may hold `memory_bytes` together, and ends with the context. Raises
    UsageError, ClusterError.
    """
    check_engine(name)
    if name == "threads":
        yield None
        return
    if place().is_gpu:
        raise UsageError("--engine ray computes on the machines' cores; leave out --device.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns
    import ray

    if ray.is_initialized():  # by the program that calls us
        yield RayEngine(workers)
        return
    _connect(workers, memory_bytes)
    # What Ray has to say of lost machines goes to stdout, whatever it is told, and breaks --json.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield RayEngine(workers)
    finally:
        ray.shutdown()


def _connect(workers: int | None, memory_bytes: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _start(workers, memory_bytes, quiet)
        return
    try:
        _check_answers(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise blamed(
            error,
            ClusterError(
                f"No Ray cluster can be joined at RAY_ADDRESS={address} ({_first_sentence(error)}); "
                "start one with `ray start`, also on this machine, give its HOST:PORT, and set "
                "RAY_AUTH_MODE=token if it asks for a token; or unset RAY_ADDRESS."
            ),
        ) from None


def _start(workers: int | None, memory_bytes: int | None, quiet: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=workers or default_workers(),
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            _memory=memory_bytes,
            **quiet,
        )
    except Exception as error:  # a start that fails or takes too long is a bare Exception
        raise blamed(
            error,
            ClusterError(
                f"Ray does not start on this machine ({_first_sentence(error)}); try again when it is "
                "less busy, or leave out --engine ray."
            ),
        ) from error


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


def _check_answers(address: str) -> None:
    """Raises OSError, ValueError where Ray itself would go on trying for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in host:
        raise ValueError("deltafold runs on a machine of the cluster, not as a client of it")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@dataclass(frozen=True)
class _Machines:
    """Those of the cluster that take tasks: which, their cores, the most memory of one."""

    ids: frozenset[str] = frozenset()
    cpus: int = 0
    memory_bytes: int = 0

    @classmethod
    def look(cls) -> _Machines:
        import ray

        found = {each["NodeID"]: each["Resources"] for each in ray.nodes() if each["Alive"]}
        able = {name: each for name, each in found.items() if each.get("CPU", 0) >= 1}
        return cls(
            frozenset(able),
            sum(int(each["CPU"]) for each in able.values()),
            int(max((each.get("memory", 0) for each in able.values()), default=0)),
        )


class RayEngine:
    """Runs stages on the cluster that this process is connected to."""

    def __init__(self, workers: int | None):
        self.workers = workers
        self.cpus = self.peak_bytes = 0
        self.seen: frozenset[str] = frozenset()
        self._now = _Machines()
        self._looked = self._able = 0.0

    def to_record(self) -> dict[str, Any]:
        """Machines seen and lost, the most cores at a time, and the largest worker process."""
        return {
            "name": "ray",
            "machines": len(self.seen),
            "machines_lost": len(self.seen - self._now.ids),
            "cpus": self.cpus,
            "peak_worker_memory_bytes": self.peak_bytes,
        }

    def run(self, stage: str, tasks: Sequence[Task], progress: Progress | None) -> None:
        """As `engine.run_tasks`: on a failure no further task starts, those that run are waited for.

        Raises the error of the task that stands first in `tasks`; ClusterError for what is lost.
        """
        import ray

        if not tasks:
            return
        self._able = time.monotonic()
        tally = Tally(stage, tasks, progress)
        stored = ray.put(ray.cloudpickle.dumps([task.run for task in tasks]))
        waiting = deque(range(len(tasks)))
        running: dict[Any, int] = {}
        errors: dict[int, BaseException] = {}
        asked: dict[int, int] = {}
        # Nothing is cancelled on Ctrl-C: a job's tasks end with it, or do no harm where it goes on.
        while (waiting and not errors) or running:
            self._look(max((asked[index] for index in running.values()), default=0))
            while waiting and not errors and len(running) < self._slots:
                index = waiting.popleft()
                need = tasks[index].memory_bytes + PROCESS_BYTES
                asked[index] = min(need, self._now.memory_bytes)
                running[self._start(stored, index, asked[index])] = index
            done, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
            for reference in done:
                index = running.pop(reference)
                try:
                    result, peak_bytes = ray.get(reference)
                except Exception as error:
                    errors[index] = _in_plain(error, tasks[index])
                    continue
                self.peak_bytes = max(self.peak_bytes, peak_bytes)
                tally.ended(tasks[index], result)
        self._observe()
        if errors:
            raise errors[min(errors)]

    @property
    def _slots(self) -> int:
        """Tasks under way: as many as were asked for, else enough to keep every core busy."""
        return self.workers or max(1, 2 * self._now.cpus)

    def _start(self, stored: Any, index: int, memory_bytes: int) -> Any:
        import ray

        remote = ray.remote(_work).options(
            num_cpus=1, memory=memory_bytes, max_retries=MAX_RETRIES, name=f"deltafold-{index}"
        )
        return remote.remote(_versions(), [stored], index)

    def _look(self, asked_bytes: int) -> None:
        """See what machines there are. Raises ClusterError if for long none could do what is asked."""
        now = time.monotonic()
        if self._now.ids and now - self._looked < LOOK_SECONDS:
            return
        self._observe()
        if self._now.ids and self._now.memory_bytes >= asked_bytes:
            self._able = now
        elif now - self._able > PATIENCE_SECONDS:
            raise ClusterError(
                f"The Ray cluster has no machine left with a core and {asked_bytes / 1e9:.1f} GB for a "
                "task; start one and run the same command again: it goes on where it stopped."
            )

    def _observe(self) -> None:
        self._now, self._looked = _Machines.look(), time.monotonic()
        self.seen |= self._now.ids
        self.cpus = max(self.cpus, self._now.cpus)


# --- in a worker process ----------------------------------------------------------------------

_stage: tuple[str, list[Callable[[], object]]] = ("", [])
"""The stage at hand: which, and what its tasks run."""


def _work(versions: dict[str, str], stored: list[Any], index: int) -> tuple[int, int]:
    """Run a task of a stage; the bytes it made, and the peak of this process's memory.

    `stored` holds a reference: Ray would fetch what stands there bare, for every task.
    """
    global _stage
    import ray

    _check_versions(versions)
    if _stage[0] != stored[0].hex():
        import torch

        torch.set_num_threads(1)
        _stage = ("", [])
        _stage = (stored[0].hex(), pickle.loads(ray.get(stored[0])))
    result = _stage[1][index]()
    trim()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        result if isinstance(result, int) else 0,
        peak if sys.platform == "darwin" else peak * 1024,
    )


@cache
def _versions() -> dict[str, str]:
    """What decides over bytes."""
    import numpy
    import torch

    return {"deltafold": __version__, "torch": torch.__version__, "numpy": numpy.__version__}


def _check_versions(wanted: dict[str, str]) -> None:
    for package, version in wanted.items():
        if (found := _versions()[package]) != version:
            raise ClusterError(
                f"The machine {platform.node()} has {package} {found}, and the one that gives the "
                f"tasks {version}; install the same on all, so that the bytes are the same."
            )


# --- back in the driver -----------------------------------------------------------------------


def _in_plain(error: Exception, task: Task) -> BaseException:
    """The error of a task as the task raised it; what Ray itself says as one sentence."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        cause: BaseException = error.cause
        if "failed to import on the worker" in str(cause):
            return ClusterError(
                f"A machine of the Ray cluster cannot import deltafold; install deltafold {__version__} on "
                "all of them, for the Python that Ray runs."
            )
        if not isinstance(cause, DeltafoldError | OSError | MemoryError):
            cause.__cause__ = error  # whose text is the traceback over there
        return cause
    if isinstance(error, RayError):
        return ClusterError(
            f"The worker of {task.name} was lost again and again ({type(error).__name__}); give the "
            "machines more memory, and run the same command again: it goes on where it stopped."
        )
    return error
