"""What other libraries raise, at every border: one sentence of ours, and nothing half-written."""

from __future__ import annotations

import ast
import concurrent.futures
import errno
import json
import os
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zstandard
from command_line import Told
from command_line import deltafold as command_line
from faults.models import Models, make_models

import deltafold as package
from deltafold.archive import reader
from deltafold.checkpoint import disk
from deltafold.codecs.lowrank import CODEC as LOWRANK
from deltafold.errors import (
    ArchiveError,
    CheckpointError,
    DeltafoldError,
    DeviceError,
    OutOfMemoryError,
    StorageError,
    UnexpectedError,
    UsageError,
)
from deltafold.foreign import blamed, in_sentences, shortage, told

CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
)
GPU_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 8 GiB."

LACKING: dict[str, tuple[Callable[[], Exception], type[DeltafoldError], str]] = {
    "memory of Python": (MemoryError, OutOfMemoryError, "Out of memory"),
    "memory of torch": (lambda: RuntimeError(CPU_MEMORY), OutOfMemoryError, "--memory"),
    "memory of the system": (
        lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfMemoryError, "--workers",
    ),
    "memory of a GPU": (lambda: torch.OutOfMemoryError(GPU_MEMORY), DeviceError, "cuda:1"),
    "threads": (
        lambda: RuntimeError("can't start new thread"), OutOfMemoryError, "No further thread",
    ),
    "space": (lambda: OSError(errno.ENOSPC, "No space left"), StorageError, "No space left"),
    "open files": (lambda: OSError(errno.EMFILE, "Too many"), StorageError, "ulimit -n"),
}  # fmt: skip


# --- what is told of what ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", LACKING)
def test_what_the_machine_lacks_blames_no_input(case: str) -> None:
    make, kind, words = LACKING[case]
    found = blamed(make(), ArchiveError("The archive is damaged; fetch it again."))
    assert type(found) is kind
    assert found.passing
    assert words in str(found)


def test_a_cause_is_looked_for() -> None:
    """transformers and others raise errors of their own over what happened."""
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("weights cannot be loaded") from error
    except ValueError as error:
        assert isinstance(shortage(error), OutOfMemoryError)


def test_what_an_input_holds_is_not_taken_for_a_shortage() -> None:
    for error in (ValueError("tensor out of memory.weight"), KeyError("bad_alloc"), TypeError("x")):
        assert shortage(error) is None
    otherwise = CheckpointError("x is broken; put it right.")
    assert blamed(RuntimeError("size mismatch"), otherwise) is otherwise
    assert not otherwise.passing
    assert blamed(OSError(errno.EIO, "Input/output error"), otherwise).passing


def test_ours_stays_as_it_is() -> None:
    ours = UsageError("x must be y.")
    assert blamed(ours, CheckpointError("z")) is ours
    assert told(ours) is ours
    assert shortage(ours) is None
    with pytest.raises(UsageError) as caught, in_sentences():
        raise ours
    assert caught.value is ours


def test_a_mistake_of_ours_is_told_as_such_with_its_place() -> None:
    with pytest.raises(KeyError) as caught, in_sentences():
        raise KeyError("x")  # for Python it stays what it is
    found = told(caught.value)
    assert type(found) is UnexpectedError
    assert found.exit_code == 70
    assert "KeyError: 'x'" in str(found)


def test_a_sentence_is_one_line_whatever_a_name_is_made_of() -> None:
    found = str(CheckpointError("a\nb\x1b[31m caf\udce9 \N{SNOWMAN} is odd; rename it."))
    assert found == "a\\nb\\x1b[31m caf\\udce9 \N{SNOWMAN} is odd; rename it."


def test_a_name_that_is_not_utf_8() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "caf\udce9".encode()
    assert "caf\\udce9" in str(told(caught.value))


# --- every border -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("foreign") / "models")


Patch = Callable[[pytest.MonkeyPatch, Callable[..., Any]], None]
Command = Callable[[Models, Path], tuple[object, ...]]


def compress(*settings: object) -> Command:
    return lambda m, out: ("compress", m.base, m.tuned, "-o", out, *settings)


RESTORE: Command = lambda m, out: ("restore", m.lossy, "--base", m.base, "-o", out)  # noqa: E731
VERIFY: Command = lambda m, out: ("verify", m.lossy, "--base", m.base)  # noqa: E731
LOSSY = compress("--method", "lowrank", "--file-ratio", "2.4")
EXACT = compress("--method", "lossless")
AUTO = compress("--file-ratio", "3")
FOLD: Command = lambda m, out: (  # noqa: E731
    "fold", m.base, "-o", out, "--blocks", 1, "--calibration", m.text, "--samples", 2
)  # fmt: skip


def of(owner: object, name: str) -> Patch:
    return lambda patch, fail: patch.setattr(owner, name, fail)


def zstd(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    known = {n: getattr(zstandard, n) for n in dir(zstandard) if not n.startswith("__")}
    fake = types.SimpleNamespace(**known | {"ZstdDecompressor": fail})
    patch.setattr(reader, "zstandard", fake)


BORDERS: dict[str, tuple[Patch, Command]] = {
    "reading weights": (of(os, "preadv"), LOSSY),
    "reading weights of a base": (of(os, "preadv"), RESTORE),
    "opening weights": (of(os, "open"), VERIFY),
    "reading small files": (of(Path, "read_bytes"), EXACT),
    "reading an archive": (of(Path, "read_bytes"), VERIFY),
    "sizes": (of(Path, "stat"), RESTORE),
    "unpacking a small file": (zstd, RESTORE),
    "decoding": (of(LOWRANK, "decode"), VERIFY),
    "decoding to write": (of(LOWRANK, "decode"), RESTORE),
    "decomposing": (of(torch.linalg, "eigh"), LOSSY),
    "writing": (of(os, "pwrite"), RESTORE),
    "syncing": (of(os, "fsync"), RESTORE),
    "renaming": (of(Path, "replace"), LOSSY),
    "folders": (of(Path, "mkdir"), EXACT),
    "JSON": (of(json, "loads"), VERIFY),
    "a tokenizer": (of(transformers.AutoTokenizer, "from_pretrained"), AUTO),
    "a config": (of(transformers.AutoConfig, "from_pretrained"), FOLD),
    "building a model": (of(transformers.LlamaForCausalLM, "_from_config"), AUTO),
    "running a model": (of(torch.nn.functional, "silu"), AUTO),
    "running blocks": (of(torch.nn.functional, "silu"), FOLD),
    "threads": (of(concurrent.futures.ThreadPoolExecutor, "submit"), RESTORE),
}


@pytest.mark.parametrize("case", LACKING)
@pytest.mark.parametrize("border", BORDERS)
def test_what_the_machine_lacks(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, border: str, case: str
) -> None:
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "cache"))
    make, kind, words = LACKING[case]
    patch, command = BORDERS[border]
    out = tmp_path / "out"

    def fail(*_: object, **__: object) -> None:
        raise make()

    with monkeypatch.context() as context:
        patch(context, fail)
        found = command_line(*command(models, out))
    one_sentence(found, kind.exit_code, words)
    assert "again: it" in found.err or "fetch" not in found.err
    assert not out.exists()


def one_sentence(found: Told, code: int, *words: str) -> None:
    assert found.code == code, found
    assert len(found.lines) == 1, found.err
    assert found.lines[0].startswith("deltafold: ")
    for each in words:
        assert each in found.lines[0]


def test_a_mistake_on_the_command_line(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deltafold.restoring import inspect as module

    def fail(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(module, "check_codecs", fail)
    found = command_line("inspect", models.lossy)
    one_sentence(found, 70, "KeyError: 'x'", "restoring/inspect.py, line ", "DELTAFOLD_TRACEBACK")
    monkeypatch.setenv("DELTAFOLD_TRACEBACK", "1")
    found = command_line("inspect", models.lossy)
    assert found.code == 70
    assert "Traceback" in found.err


def test_what_fails_in_the_background_is_raised_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that syncs files lives on, and says nothing by itself."""
    unheard: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unheard.append)
    (tmp_path / "x").write_text("x")
    later = disk.Later(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(disk, "sync", lambda _: (_ for _ in ()).throw(MemoryError()))
        context.setattr(disk, "SYNC_SECONDS", 0.0)
        later.add(tmp_path / "x")
        with pytest.raises(MemoryError):
            for _ in range(1000):
                later.flush()
                time.sleep(0.001)
    later.add(tmp_path / "x")
    later.flush()
    later.close()
    assert unheard == []


# --- that no border is left out -----------------------------------------------------------------------

BROAD = {"Exception", "BaseException", "RuntimeError", "MemoryError", "OSError", "_UNSOUND"}
TELLS = {"blamed", "shortage", "unread", "unwritten", "told", "_known", "_damaged", "passing"}
# Where it does no harm to take a shortage for an answer.
HARMLESS = {
    "archive/reader.py:_opened_elsewhere": "a cluster's machine that lacks the file",
    "checkpoint/view.py:_opened_elsewhere": "the same",
    "checkpoint/view.py:_refuse_other_file": "the reader of headers says why",
    "checkpoint/writer.py:__setstate__": "a cluster's machine that lacks the file",
    "checkpoint/disk.py:_sync_waiting": "kept, and raised when it is asked for",
    "running/locks.py:is_ours": "what cannot be read is not known to be ours",
    "calibration/usage.py:_text": "code that cannot be seen is taken for unusual",
    "calibration/usage.py:_computes_a_product": "the same",
    "checkpoint/disk.py:exchange": "a system that has no such call",
    "checkpoint/noted.py:is_as_noted": "what is kept is made again",
    "checkpoint/sealed.py:_check": "a file that cannot be read is as good as absent",
    "checkpoint/sealed.py:_has_seal": "the same",
    "checkpoint/store.py:_writable": "a cache that cannot be written is said",
    "checkpoint/store.py:at": "a store that cannot be opened has reasons of its own, which it says",
    "comparing/page.py:serve": "a port",
    "exporting/serve.py:run": "a program that cannot be started",
    "exporting/serve.py:_request": "a network",
    "publishing/card.py:_card_text": "a courtesy",
    "running/cluster.py:run": "a task's own error, handed on",
    "running/locks.py:_take": "a lock that cannot be had",
    "running/record.py:_cpu_name": "a courtesy",
    "running/memory.py:resident_bytes": "another way to tell",
    "running/folders.py:_check_ours": "a folder that cannot be listed is another's",
    "running/folders.py:finished": "said",
}


def test_every_broad_handler_asks_what_is_lacking() -> None:
    """A handler that may catch a shortage must ask for it before it blames an input."""
    source = Path(package.__file__).parent
    found = {}
    for file in sorted(source.rglob("*.py")):
        name = file.relative_to(source).as_posix()
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                for handler in ast.walk(function):
                    if isinstance(handler, ast.ExceptHandler) and _may_hide(handler):
                        found[f"{name}:{function.name}"] = handler.lineno
    assert found.keys() - HARMLESS.keys() == set(), found
    assert HARMLESS.keys() - found.keys() == set()


def _may_hide(handler: ast.ExceptHandler) -> bool:
    caught = {
        n.id for n in ast.walk(handler.type or ast.Name("Exception")) if isinstance(n, ast.Name)
    }
    inside = list(ast.walk(ast.Module(handler.body, [])))
    names = {n.id for n in inside if isinstance(n, ast.Name)}
    names |= {n.attr for n in inside if isinstance(n, ast.Attribute)}
    again = any(isinstance(n, ast.Raise) and n.exc is None for n in inside)
    return bool(caught & BROAD) and not names & TELLS and not again
