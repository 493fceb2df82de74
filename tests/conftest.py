"""Fixtures that every test file may use: a small pair, its archives, the command line."""

from __future__ import annotations

import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import PairFiles
from checkpoints import make_pair as write_pair
from processes import Processes

FILE_RATIO = 8  # small files: half of a tighter archive would be its manifest
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure of their models is not kept in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices are quicker without threads, and several test runs may share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _seldom() -> Iterator[None]:
    """Garbage is looked for less often: most of what tests make goes by itself."""
    before = gc.get_threshold()
    gc.set_threshold(20_000, 20, 20)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """What was imported stays: garbage is looked for among what tests make, not in a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make_pair() -> Callable[..., PairFiles]:
    """`make_pair(tmp_path, **options)`: see `checkpoints.make_pair`."""
    return write_pair


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> PairFiles:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(_template: PairFiles, tmp_path: Path) -> PairFiles:
    """A pair of its own for each test: `.base`, `.finetuned` (folders), `.tensors`."""
    for name in ("base", "finetuned"):
        shutil.copytree(_template.base.parent / name, tmp_path / name)
    return replace(_template, base=tmp_path / "base", finetuned=tmp_path / "finetuned")


@pytest.fixture(scope="session")
def _archives(_template: PairFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deltafold import compress

    folder = tmp_path_factory.mktemp("archives")
    base, finetuned = _template.base, _template.finetuned
    compress(base, finetuned, folder / "impart.delta", "impart", file_ratio=FILE_RATIO)
    compress(base, finetuned, folder / "lossless.delta", "lossless")
    return folder


@pytest.fixture
def archive(_archives: Path, tmp_path: Path) -> Path:
    """An impart archive of `pair`, one for each test."""
    return shutil.copytree(_archives / "impart.delta", tmp_path / "impart.delta")


@pytest.fixture
def lossless_archive(_archives: Path, tmp_path: Path) -> Path:
    """A lossless archive of `pair`, one for each test."""
    return shutil.copytree(_archives / "lossless.delta", tmp_path / "lossless.delta")


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Programs in processes of their own, without a start of torch each: see `processes.py`."""
    found = Processes()
    yield found
    found.close()


@pytest.fixture
def deltafold(processes: Processes) -> Run:
    """Run the command line in a process of its own: `deltafold("inspect", path)`."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return processes.run("-m", "deltafold", *arguments, **environment)

    return run
