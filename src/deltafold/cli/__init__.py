"""The command line: one file a command; each parses, calls one verb, prints.

Torch and transformers are imported inside commands only, so that `--help` is quick.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import shlex
import signal
import sys
import traceback
import warnings
from typing import NoReturn, TextIO

import typer

from deltafold.cli.compare import compare
from deltafold.cli.compress import compress
from deltafold.cli.evaluate import evaluate
from deltafold.cli.export import export
from deltafold.cli.factor import factor
from deltafold.cli.fold import fold
from deltafold.cli.inspect import inspect
from deltafold.cli.merge import merge
from deltafold.cli.methods import methods
from deltafold.cli.plan import plan
from deltafold.cli.push import push
from deltafold.cli.report import report
from deltafold.cli.restore import restore
from deltafold.cli.serve import serve
from deltafold.cli.share import share
from deltafold.cli.verify import verify
from deltafold.errors import DeltafoldWarning, StorageWarning
from deltafold.foreign import told
from deltafold.running.record import COMMAND
from deltafold.version import __version__

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended: 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM
_exit_code = INTERRUPTED

app = typer.Typer(
    name="deltafold",
    help="LLM weights, stored as small differences from weights you already have.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    plan, compress, inspect, verify, restore, export, serve, merge, fold, share, factor, evaluate,
    compare, report, push, methods,
):  # fmt: skip
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        print(f"deltafold {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def _say(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours is one line; others as Python shows them."""
    ours = issubclass(category, DeltafoldWarning | StorageWarning)
    text = f"deltafold: {message}\n"
    (file or sys.stderr).write(
        text if ours else warnings.formatwarning(message, category, filename, lineno, line)
    )


def _terminate(*_: object) -> NoReturn:
    """Asked to end (SIGTERM): as by Ctrl-C, with another exit code."""
    global _exit_code
    _exit_code = TERMINATED
    raise KeyboardInterrupt


def _stop() -> NoReturn:
    """After Ctrl-C. A second one comes here while threads still run: they are not waited for."""
    print(
        "\ndeltafold: stopped; run the same command again and it goes on where it was.",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(_exit_code)


def main() -> None:
    """Entry point: whatever is raised becomes one sentence on stderr and an exit code."""
    warnings.showwarning = _say
    signal.signal(signal.SIGTERM, _terminate)
    COMMAND.set(shlex.join(["deltafold", *sys.argv[1:]]))
    # Python looks for garbage once more when it ends: a second's work, in all that torch brings.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # what Ctrl-C has become on its way through typer
            _stop()
        raise
    except KeyboardInterrupt:
        _stop()
    except BrokenPipeError:  # whoever reads stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if os.environ.get("DELTAFOLD_TRACEBACK"):
            traceback.print_exc()
        found = told(error)
        print(f"deltafold: {found}", file=sys.stderr)
        sys.exit(found.exit_code)
