"""Programs in processes of their own, forked from one that has imported the heavy libraries already.

A start of `python -m deltafold` spends seconds on `import torch`. Here a helper process imports torch and
transformers once, runs nothing, and forks itself for each program: what is told, exit codes, signals and
a place of its own in memory are as after a start from the shell. deltafold itself is imported by each
program anew, so that an import that is missing or goes in a circle still shows.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 200  # a program that takes longer is killed, by SIGALRM
LIBRARIES = [
    "torch",
    "torch.nn",
    "numpy",
    "safetensors.torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "typer",
    "rich.progress",
    "pydantic",
    "yaml",
    "zstandard",
    "constriction",
]


class Program:
    """One program that runs, or has run: `pid`, and its exit code once it was waited for."""

    def __init__(self, processes: Processes, pid: int, told: Path):
        self._processes, self.pid, self._told = processes, pid, told
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal; one to a program that has ended is lost."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus a signal's number if that ended it."""
        if self.returncode is None:
            self.returncode = self._processes.ask({"ask": "poll", "pid": self.pid})
        return self.returncode

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end: exit code, stdout, stderr."""
        if self.returncode is None:
            self.returncode = self._processes.ask({"ask": "wait", "pid": self.pid})
        out, err = (self._told.with_suffix(end).read_text() for end in (".out", ".err"))
        return subprocess.CompletedProcess([], self.returncode, out, err)


class Processes:
    """The helper process, from its first program until `close`."""

    def __init__(self) -> None:
        self._told = tempfile.TemporaryDirectory(prefix="programs")
        self._started = 0
        self._server: subprocess.Popen[str] | None = None

    def start(self, *command: object, **environment: str) -> Program:
        """As `python *command`: `-m module arguments` or `-c code arguments`."""
        self._started += 1
        told = Path(self._told.name, str(self._started))
        wish = {"command": list(map(str, command)), "told": str(told), "folder": str(Path.cwd())}
        threads = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return Program(
            self, self.ask(wish | {"environment": os.environ | threads | environment}), told
        )

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """`start`, and wait for the end."""
        return self.start(*command, **environment).wait()

    def ask(self, wish: dict[str, Any]) -> Any:
        """What the helper answers to a wish, see `serve`."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": self._told.name},
            )  # fmt: skip
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(wish) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the helper."""
        if self._server is not None:
            self._server.communicate()
        self._told.cleanup()


def serve() -> dict[str, Any]:
    """Answer wishes, a line each: `command` with a pid, `poll` and `wait` with an exit code or null.

    Returns in a forked process alone, with the wish that it is to fulfil. The helper ends with its input.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # a forked process neither looks through nor copies what was imported
    while line := sys.stdin.readline():
        wish: dict[str, Any] = json.loads(line)
        if "command" in wish:
            answer: int | None = os.fork()
            if answer == 0:
                return wish
        else:
            pid, status = os.waitpid(wish["pid"], os.WNOHANG if wish["ask"] == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)
    sys.exit()


def become(wish: dict[str, Any]) -> None:
    """This process is a program from now on: its own files, environment, folder, time limit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(SECONDS)
    for number, name in enumerate((os.devnull, wish["told"] + ".out", wish["told"] + ".err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)  # the helper's has read ahead
    os.environ.clear()
    os.environ.update(wish["environment"])
    os.chdir(wish["folder"])
    kind, what, *arguments = wish["command"]
    sys.path[0] = wish["folder"] if kind == "-m" else ""
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    become(serve())
