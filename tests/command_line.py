"""The command line in this process: exit code, stdout, stderr."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass
from unittest import mock

from deltafold.cli import main


@dataclass(frozen=True)
class Told:
    """What one command came to."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said on stderr."""
        return self.err.splitlines()


def deltafold(*arguments: object) -> Told:
    """As `deltafold *arguments` from the shell, but for what torch is set to and has imported."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    before = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", ["deltafold", *map(str, arguments)]),
        mock.patch.dict("os.environ", {"COLUMNS": "200"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
    return Told(
        code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue()
    )
