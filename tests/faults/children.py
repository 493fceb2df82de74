"""A job in a process of its own, forked from this one: what is killed there is killed there alone."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line import Told
from faults.calls import Calls

STOPPED = (130, 143)  # by Ctrl-C, by SIGTERM
SECONDS = 300  # of a machine that does much else
Work = Callable[[], Told]


@dataclass(frozen=True)
class Ended:
    """How a child ended: what it told, or the signal that ended it."""

    told: Told
    signal: int = 0
    calls: int = 0  # that were counted

    @property
    def killed(self) -> bool:
        return self.signal != 0


class Child:
    """One process that does `work`. `calls` disturbs it; `room_bytes` is all the memory it may add."""

    def __init__(
        self, work: Work, answer: Path, calls: Calls | None = None, room_bytes: int | None = None
    ):
        self._answer = answer
        answer.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            _live(work, answer, calls, room_bytes)

    def until_stopped(self) -> bool:
        """Wait until it stops itself; False if it ended instead."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self._status = status
        return False

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> Ended:
        """Wait for the end."""
        status = getattr(self, "_status", None)
        if status is None:
            _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return Ended(Told(-1, "", ""), os.WTERMSIG(status))
        try:
            found = json.loads(self._answer.read_text())
            return Ended(Told(**found["told"]), calls=found["calls"])
        except (OSError, ValueError):  # ended by Ctrl-C, or by a library without a word
            if (code := os.waitstatus_to_exitcode(status)) in STOPPED:
                return Ended(Told(code, "", ""))
            return Ended(Told(-1, "", ""), signal.SIGABRT)


def _live(work: Work, answer: Path, calls: Calls | None, room_bytes: int | None) -> None:
    signal.alarm(SECONDS)
    told = Told(70, "", "deltafold: nothing was told.")
    try:
        # What libraries write past Python is not for the terminal.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if room_bytes is not None:
            _limit(room_bytes)
        with calls.watched() if calls else contextlib.nullcontext():
            told = work()
    except BaseException:
        told = Told(70, "", traceback.format_exc())
    with contextlib.suppress(BaseException):
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    try:
        answer.write_text(json.dumps({"told": asdict(told), "calls": calls.count if calls else 0}))
    finally:
        os._exit(0)


def _limit(room_bytes: int) -> None:
    status = Path("/proc/self/status").read_text()
    held = 1024 * int(status.partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (held + room_bytes, resource.RLIM_INFINITY))


def forked(
    work: Work, answer: Path, calls: Calls | None = None, room_bytes: int | None = None
) -> Ended:
    """Do `work` in a child, and wait for it."""
    return Child(work, answer, calls, room_bytes).wait()
