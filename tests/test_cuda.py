"""On a real GPU, where there is one: the same results as the CPU's up to rounding, the same bytes again.

What a pretended GPU cannot show: streams, memory, kernels, rounding. Run with `pytest -m cuda`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_checkpoint, tree_hashes
from evaluation_models import make_tokenizer
from folding_models import write_text
from tiny_models import FAMILIES, write_family
from transformers import AutoModelForCausalLM

from deltafold import compress, export, factor, fold, load, restore, share
from deltafold.calibration import Sample
from deltafold.calibration.fisher import measure_fisher
from deltafold.errors import DeviceError
from deltafold.linalg.decomposition import truncated_svd, truncated_svds
from deltafold.linalg.matrices import DenseMatrix
from deltafold.running import devices
from deltafold.running.devices import Place, computing, put
from deltafold.running.engine import Task, run_tasks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SAMPLES = [Sample(tuple(range(3 + n, 60 + n)), 8) for n in range(6)]


def random_matrix(o: int, i: int, seed: int = 0) -> DenseMatrix:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(o, 24, generator=generator), torch.randn(24, i, generator=generator)
    noise = 0.1 * torch.randn(o, i, generator=generator)
    return DenseMatrix((left * torch.linspace(3, 1, 24)) @ right + noise)


@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (1200, 1100)])
@pytest.mark.parametrize("wide", ["float64", "float32"])
def test_decompositions(shape: tuple[int, int], wide: str) -> None:
    matrices = [random_matrix(*shape, seed) for seed in range(4)]
    wanted = [truncated_svd(each, 24, 5) for each in matrices]
    with computing("cuda") as place:
        place.wide = wide
        alone = [truncated_svd(each, 24, 5) for each in matrices]
        together = truncated_svds(matrices, 24, [5] * 4)
        again = truncated_svds(matrices, 24, [5] * 4)
    for one, two, three, four in zip(wanted, alone, together, again, strict=True):
        assert torch.equal(three.u, four.u) and torch.equal(three.v, four.v)
        for found in (two, three):
            assert found.u.device.type == "cpu"
            assert torch.allclose(found.s, one.s, rtol=1e-4)
            gap = (found.u * found.s) @ found.v.T - (one.u * one.s) @ one.v.T
            assert float(gap.norm() / one.s.norm()) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip(family: str, tmp_path: Path) -> None:
    base, finetuned = write_family(tmp_path, family)
    options: dict[str, Any] = {"file_ratio": 4, "calibration": "none"}
    compress(base, finetuned, tmp_path / "cpu.delta", "svd-quant", **options)
    for name, workers in (("one", 1), ("two", 4)):
        record = compress(
            base, finetuned, tmp_path / f"{name}.delta", "svd-quant", device="cuda",
            workers=workers, **options,
        )  # fmt: skip
        assert record["device"]["name"].startswith("cuda:")
    assert tree_hashes(tmp_path / "one.delta") == tree_hashes(tmp_path / "two.delta")
    restore(tmp_path / "one.delta", base, tmp_path / "gpu", device="cuda")
    restore(tmp_path / "one.delta", base, tmp_path / "cpu")
    on_gpu, on_cpu = read_checkpoint(tmp_path / "gpu"), read_checkpoint(tmp_path / "cpu")
    for name, found in on_gpu.items():
        wrong = (found.float() - on_cpu[name].float()).abs()
        assert float(wrong.max()) <= 2**-7 * float(on_cpu[name].float().abs().max()), name
    export(tmp_path / "one.delta", tmp_path / "adapter", base=base, rank=4, device="cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_text_weighs_the_same(family: str, tmp_path: Path) -> None:
    _, finetuned = write_family(tmp_path, family)
    wanted = measure_fisher(finetuned, SAMPLES, cache=tmp_path / "cpu")
    with computing("cuda"):
        found = measure_fisher(finetuned, SAMPLES, cache=tmp_path / "gpu")
        again = measure_fisher(finetuned, SAMPLES, cache=tmp_path / "again")
    for name, one in wanted.items():
        assert torch.equal(found[name].rows, again[name].rows), name
        gap = (found[name].columns - one.columns).norm() / one.columns.norm()
        assert float(gap) < 0.1, name  # bf16, where that is chosen


def test_every_command(tmp_path: Path) -> None:
    base, finetuned = write_family(tmp_path, "llama")
    for folder in (base, finetuned):
        make_tokenizer().save_pretrained(folder)
    text = write_text(tmp_path / "text.txt", 96)
    shared: dict[str, Any] = {"calibration": text, "max_tokens": 40, "device": "cuda"}
    trained = compress(
        base, finetuned, tmp_path / "a.delta", "auto", file_ratio=6, steps=2, **shared
    )
    near = compress(base, finetuned, tmp_path / "b.delta", "lowrank", kl_at_most=0.01, **shared)
    factored = factor(finetuned, tmp_path / "factored", "lord", parameters=0.9, text=text, **shared)
    folded = fold(finetuned, tmp_path / "folded", "auto", blocks=1, text=text, steps=2, **shared)
    halved = share(
        finetuned, tmp_path / "shared", shared=1, rank=4, protect=(), steps=2, calibration=text,
        max_tokens=16, device="cuda",
    )  # fmt: skip
    for record in (trained, near, factored, folded, halved):
        assert record["device"]["name"].startswith("cuda:")
    assert trained["totals"]["file_ratio"] >= 0.99 * 6
    assert trained["distill"]["kl_after"] <= trained["distill"]["kl_before"]
    (kept,) = [each for each in near["tried"] if each.get("kept")]
    assert kept["value"] <= 0.01
    assert factored["parameters"]["parameter_share"] <= 0.9
    assert 0 < factored["quality"]["factored"]["kl"] < 0.01
    assert folded["quality"]["healed"]["kl"] <= folded["quality"]["unhealed"]["kl"] < 0.1
    assert [row["step"] for row in halved["curve"]] == [1, 2]
    for name, record in (("a", trained), ("b", near)):
        assert tree_bytes(tmp_path / f"{name}.delta") == record["totals"]["archive_bytes"]
        restore(tmp_path / f"{name}.delta", base, tmp_path / f"restored {name}")
    ids = torch.arange(3, 27)[None]
    for name in ("restored a", "restored b", "folded"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model(ids).logits.isfinite().all(), name
    for name in ("factored", "shared"):
        assert load(tmp_path / name)(ids).logits.isfinite().all(), name


def tree_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_training_gives_the_same_bytes_again(tmp_path: Path) -> None:
    """Attention's fast backward passes add in any order unless they are told not to."""
    _, finetuned = write_family(tmp_path, "llama")
    make_tokenizer().save_pretrained(finetuned)
    text = write_text(tmp_path / "text.txt", 96)
    for name in ("one", "two"):
        share(
            finetuned, tmp_path / name, shared=1, rank=4, protect=(), steps=6, calibration=text,
            max_tokens=32, bf16=True, tune="all", device="cuda",
        )  # fmt: skip
    assert tree_hashes(tmp_path / "one") == tree_hashes(tmp_path / "two")


def test_solvers_are_loaded_before_threads_ask_for_them() -> None:
    """In a process of its own: torch loads them once, and fails where several threads begin."""
    program = (
        "import torch\n"
        "from deltafold.running.devices import computing, here\n"
        "from deltafold.running.engine import Task, run_tasks\n"
        "def work(): torch.linalg.cholesky(torch.eye(8, device=here()))\n"
        "with computing('cuda'):\n"
        "    run_tasks('test', [Task(str(n), work) for n in range(16)], workers=8)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_workers_overlap() -> None:
    """Four threads with a stream each are no slower than one: reading goes on beside computing."""

    def work() -> None:
        for _ in range(4):
            time.sleep(0.02)  # a read
            matrix = put(torch.ones(512, 512))
            (matrix @ matrix).sum().item()

    tasks = [Task(str(n), work) for n in range(16)]
    seconds = []
    with computing("cuda"):
        for workers in (1, 4):
            start = time.perf_counter()
            run_tasks("test", tasks, workers=workers)
            seconds.append(time.perf_counter() - start)
    assert seconds[1] < seconds[0]


def test_streams_do_not_mix_up_results() -> None:
    matrices = [random_matrix(300, 200, seed) for seed in range(12)]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = truncated_svd(matrices[number], 8, number).s

    with computing("cuda"):
        run_tasks("test", [Task(str(n), lambda n=n: work(n)) for n in range(12)], workers=4)  # type: ignore[misc]
    for number, matrix in enumerate(matrices):
        assert torch.allclose(found[number], truncated_svd(matrix, 8, number).s, rtol=1e-4)


def test_memory_that_runs_out() -> None:
    with pytest.raises(DeviceError, match=r"cuda.* has too little memory free"), computing("cuda"):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")


def test_what_is_free() -> None:
    with computing("cuda") as place:
        free = devices.free_bytes()
        assert isinstance(place, Place) and free is not None
        assert 0 < (devices.task_bytes() or 0) < free
