"""Run a piece of a test in a process of its own, without importing torch again."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable


def in_a_fork(action: Callable[[], object]) -> None:
    """Run `action` in a child; fail with its traceback if it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, told


def killed_in_a_fork(action: Callable[[], object]) -> bool:
    """Run `action` in a child that may kill itself; True if it did, False if it ended well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False
