"""The skeleton of every heavy run: what is checked first, metered, resumed, published and recorded.

with Run("fold", request, sources=[request.model]) as run:
    checkpoint = run.opened(open_checkpoint(request.model))
    ...
    workspace = run.begin(identity, needed_bytes=checkpoint.total_bytes)
    ...          # tasks, through run.resources
    run.publish("folded")
    return run.record(summary | outcome)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from deltafold.archive import file_digest
from deltafold.running.cluster import check_engine, open_engine
from deltafold.running.engine import Engine, Resources
from deltafold.running.memory import Meter
from deltafold.running.outputs import check_output, check_space
from deltafold.running.record import (
    RECORD_VERSION,
    Record,
    check_record_path,
    machine,
    record_path,
    write_afterwards,
)
from deltafold.running.workspace import Workspace

T = TypeVar("T")
C = TypeVar("C", bound="Closes")


def texts_identity(texts: Sequence[object]) -> dict[str, Any]:
    """What unfinished work is bound to, of the texts that are files: what they hold."""
    files = [Path(each) for each in texts if isinstance(each, str | Path) and Path(each).is_file()]
    return {"text files": [file_digest(each.read_bytes()) for each in files]} if files else {}


class Closes(Protocol):
    """What is closed in the end."""

    def close(self) -> None: ...


class Run:
    """One run of a verb that writes an output. Use as a context manager.

    `request` is a `Writing` and a `Running`. Refuses at once what cannot be: an output that exists, a
    record that cannot be written, an engine that is not there. Raises UsageError then. Of several
    processes that compute together one `leads`: it alone has a workspace and writes. A dry run writes
    nothing, so its output is looked at only where `checks_dry_runs`.
    """

    workspace: Workspace

    def __init__(
        self,
        kind: str,
        request: Any,
        sources: Sequence[str | Path] = (),
        *,
        leads: bool = True,
        checks_dry_runs: bool = False,
    ):
        self.kind, self.request, self.leads = kind, request, leads
        self.output = Path(request.output)
        self.meter = Meter()
        self._engine: Engine | None = None
        self._stack = contextlib.ExitStack()
        if not leads or (request.dry_run and not checks_dry_runs):
            return
        self.check_output(sources)
        check_record_path(request.record)
        check_engine(getattr(request, "engine", "threads"))

    def check_output(self, sources: Sequence[str | Path]) -> None:
        """Refuse an output that exists; see `outputs.check_output`."""
        check_output(self.output, self.request.overwrite, sources)

    def __enter__(self) -> Run:
        self._stack.__enter__()
        self._stack.enter_context(self.meter)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def opened(self, thing: C) -> C:
        """Something with a `close`, closed when the run ends."""
        self._stack.callback(thing.close)
        return thing

    def entered(self, context: contextlib.AbstractContextManager[T]) -> T:
        """What a context manager gives, left when the run ends."""
        return self._stack.enter_context(context)

    def begin(self, identity: dict[str, Any], needed_bytes: int) -> Workspace:
        """The workspace of this run, where an earlier one may have left work. Raises StorageError."""
        request = self.request
        check_space(self.output, needed_bytes)
        self._engine = self.entered(
            open_engine(
                getattr(request, "engine", "threads"), request.workers, request.memory_bytes
            )
        )
        identity = identity | texts_identity([getattr(request, "calibration", None)])
        self.workspace = self.entered(Workspace(self.output, identity, request.restart))
        self.check_output(())  # another run may have made it while this one waited for its turn
        return self.workspace

    @property
    def resources(self) -> Resources:
        """What tasks may use."""
        request = self.request
        return Resources(request.workers, request.memory_bytes, request.progress, self._engine)

    def publish(self, finished: str) -> None:
        """The sub-folder `finished` of the workspace gets the output's name."""
        self.workspace.publish(finished, self.request.overwrite)

    def record(self, content: Record) -> Record:
        """The record, written last: what the run holds open is let go first, and the meter stops."""
        self._stack.close()
        result: Record = {"record_version": RECORD_VERSION, "kind": self.kind} | content
        result |= {
            "seconds": self.meter.seconds,
            "peak_memory_bytes": self.meter.peak_memory_bytes,
            "machine": machine(),
        }
        if self._engine:
            result["engine"] = self._engine.to_record()
        if self.leads:
            write_afterwards(
                result, Path(self.request.record or record_path(self.output)), self.output
            )
        return result
