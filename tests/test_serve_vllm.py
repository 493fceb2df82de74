"""`deltafold serve` with vLLM itself: DELTAFOLD_VLLM=path/to/env/bin/vllm pytest -m slow FILE."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deltafold
from deltafold.exporting.serve import ServeError, served_names

VLLM = os.environ.get("DELTAFOLD_VLLM", "")
DEMO = Path(__file__).parents[1] / "demo"
TASKS = ("add", "sort")
ROWS, START_SECONDS = 12, 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * START_SECONDS),
    pytest.mark.skipif(not VLLM, reason="DELTAFOLD_VLLM does not name vLLM's program"),
]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fine-tunes of the demo, as factors."""
    folder = tmp_path_factory.mktemp("archives")
    for name in TASKS:
        path = folder / f"{name}.delta"
        deltafold.compress(
            DEMO / "models/base", DEMO / "models" / name, path, "svd-quant", file_ratio=8
        )
    return {name: folder / f"{name}.delta" for name in TASKS}


@pytest.fixture(scope="module")
def engine(archives: dict[str, Path]) -> Iterator[str]:
    """An engine that serves `add`, by the command line; stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "deltafold", "serve", str(DEMO / "models/base"),
        "--delta", f"add={archives['add']}", "--vllm", VLLM, "--port", str(port),
        "--", "--max-model-len", "128", "--enforce-eager",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, env={"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ)
    limit = time.monotonic() + START_SECONDS
    try:
        while not answers(url):
            assert process.poll() is None, "the engine ended"
            assert time.monotonic() < limit
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(120)
    assert not answers(url)


def answers(url: str) -> bool:
    try:
        return bool(served_names(url))
    except ServeError:
        return False


def ask(url: str, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "stop": ["\n"]}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.loads(answer.read())["choices"][0]["text"]).strip()


def right(url: str, model: str, task: str) -> int:
    """How many of the first rows of a task a served model answers to the letter."""
    rows = [json.loads(line) for line in (DEMO / f"tasks/{task}.jsonl").read_text().splitlines()]
    return sum(ask(url, model, r["prompt"]) == r["answer"].strip() for r in rows[:ROWS])


def restored(archive: Path, task: str) -> int:
    """The same of the restored model, by `evaluate`."""
    found: Any = deltafold.evaluate(
        DEMO / "models" / task, [archive], DEMO / "models/base", [DEMO / f"tasks/{task}.jsonl"],
        limit=ROWS,
    )  # fmt: skip
    share = found["models"][-1]["metrics"]["tasks"][task]["exact_match"]["value"]
    return round(share * ROWS)


def test_fine_tunes_come_and_go(deltafold: Any, engine: str, archives: dict[str, Path]) -> None:
    assert served_names(engine)[1:] == ["add"]
    assert abs(right(engine, "add", "add") - restored(archives["add"], "add")) <= 1
    added = deltafold("serve", "--add", f"sort={archives['sort']}", "--to", engine)
    assert added.returncode == 0 and "add, sort" in added.stdout, added.stderr
    assert abs(right(engine, "sort", "sort") - restored(archives["sort"], "sort")) <= 1
    assert right(engine, "add", "sort") < ROWS / 2  # another fine-tune does not know this task
    removed = deltafold("serve", "--remove", "add", "--to", engine)
    assert removed.returncode == 0 and served_names(engine)[1:] == ["sort"], removed.stderr
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(engine, "add", "add 1+1=")
