"""Where heavy steps compute: names, what is handed on to threads, and decompositions elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pretend_gpu import NAME, pretending

from deltafold.errors import DeviceError, UsageError
from deltafold.linalg.decomposition import truncated_svd, truncated_svds
from deltafold.linalg.matrices import DenseMatrix, Factors, Moments
from deltafold.linalg.whitening import whitened_svd
from deltafold.running import devices
from deltafold.running.devices import (
    UNSTEADY,
    Place,
    computing,
    for_another_thread,
    here,
    place,
    put,
    resolve,
    steady,
    steady_backward,
)
from deltafold.running.engine import Task, run_tasks

SHAPES = {"tall": ((90, 40), 12), "wide": ((40, 90), 12), "randomised": ((1100, 1060), 6)}
Matrix = Callable[[str, int], tuple[DenseMatrix, int]]


@pytest.fixture
def matrix() -> Matrix:
    def make(kind: str, seed: int) -> tuple[DenseMatrix, int]:
        (o, i), rank = SHAPES[kind]
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(o, rank, generator=generator)
        right = torch.randn(rank, i, generator=generator)
        noise = torch.randn(o, i, generator=generator)
        return DenseMatrix((left * torch.linspace(3, 1, rank)) @ right + 0.05 * noise), rank

    return make


def product(factors: Factors) -> torch.Tensor:
    return (factors.u * factors.s) @ factors.v.T


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto") == resolve("cpu") == "cpu"
    for asked in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="no CUDA device"):
            resolve(asked)


def test_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [resolve(asked) for asked in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1", "cuda:1", "cuda:0", "cpu",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"no cuda:2: .* from 0 to 1"):
        resolve("cuda:2")


@pytest.mark.parametrize("asked", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "mps", "cpu:0"])
def test_an_unknown_name(asked: str) -> None:
    with pytest.raises(UsageError, match="There is no device"):
        resolve(asked)


def test_the_cpu_is_where_nobody_asked() -> None:
    assert place().name == "cpu" and not place().asked
    with computing(None) as found:
        assert found is place() and not found.asked
    with computing("cpu") as found:
        assert found is place() and found.asked
    tensor = torch.ones(3)
    assert put(tensor) is tensor
    assert devices.identity() == {} and devices.to_record() is None
    assert devices.free_bytes() is None and devices.task_bytes() is None


class _Unsteady(torch.autograd.Function):
    """A product whose backward pass says what torch says of those that have no steady form."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if torch.is_deterministic_algorithms_warn_only_enabled():
            return 2 * grad
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but")


def test_a_backward_pass_is_steady_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, requires_grad=True)
    with steady():
        with steady_backward():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            (3 * x).sum().backward()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with (
            pytest.raises(DeviceError, match=r"\(cumsum_cuda_kernel\); give --device cpu"),
            steady_backward(),
        ):
            _Unsteady.apply(x).sum().backward()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        monkeypatch.setenv(UNSTEADY, "1")
        with steady_backward():
            _Unsteady.apply(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [5.0, 5.0]
    assert not torch.are_deterministic_algorithms_enabled()
    with steady_backward():  # nobody asked for steadiness
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_place_is_left_again() -> None:
    before = torch.get_float32_matmul_precision()
    with pretending(), pytest.raises(ZeroDivisionError), computing("cuda"):
        assert str(here()) == NAME and torch.get_float32_matmul_precision() == "highest"
        assert torch.are_deterministic_algorithms_enabled()
        with computing("cpu"):
            assert str(here()) == "cpu"
        assert str(here()) == NAME
        raise ZeroDivisionError
    assert str(here()) == "cpu" and torch.get_float32_matmul_precision() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_compute_where_their_caller_does() -> None:
    with pretending(), computing("cuda"), ThreadPoolExecutor(1) as pool:
        assert str(pool.submit(here).result()) == "cpu"
        assert str(pool.submit(for_another_thread(here)).result()) == NAME
        assert str(pool.submit(here).result()) == "cpu"


def test_tasks_share_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks that fit the CPU's allowance together, but not the GPU's, run one after the other."""
    running, most = [], []

    def run() -> None:
        running.append(0)
        most.append(len(running))
        torch.randn(200, 200) @ torch.randn(200, 200)
        running.pop()

    tasks = [Task(str(n), run, 600 << 20) for n in range(6)]
    with pretending(), computing("cuda"):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (1 << 30, 1 << 33))
        run_tasks("test", tasks, workers=3, memory_bytes=1 << 32)
    assert set(most) == {1}


def test_memory_that_runs_out_is_one_sentence() -> None:
    with (
        pretending(),
        pytest.raises(DeviceError, match="pretend:0 has too little memory free"),
        computing("cuda"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_pretended_gpu_refuses_what_lies_elsewhere() -> None:
    with pretending(), computing("cuda"):
        tensor = put(torch.ones(2, 2))
        assert str(tensor.device) == NAME and tensor.cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="two devices"):
            tensor @ torch.ones(2, 2)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("capability", [(9, 0), (8, 9)], ids=["fp64", "fp32"])
def test_a_decomposition_elsewhere(kind: str, capability: tuple[int, int], matrix: Matrix) -> None:
    dense, rank = matrix(kind, 0)
    wanted = truncated_svd(dense, rank, 7)
    with pretending(capability), computing("cuda") as found:
        made = truncated_svd(dense, rank, 7)
        assert found.wide == ("float64" if capability == (9, 0) else "float32")
    assert {each.device.type for each in (made.u, made.s, made.v)} == {"cpu"}
    if capability == (9, 0):  # the same arithmetic, in larger chunks
        assert torch.allclose(made.u, wanted.u, atol=1e-6)
    assert torch.allclose(made.s, wanted.s, rtol=1e-5)
    assert torch.allclose(product(made), product(wanted), atol=2e-4)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("wide", ["float64", "float32"])
def test_matrices_of_one_shape_go_together(kind: str, wide: str, matrix: Matrix) -> None:
    made = [matrix(kind, seed) for seed in range(3)]
    dense, rank = [each for each, _ in made], made[0][1]
    keys = [11, 12, 13]
    wanted = [truncated_svd(each, rank, key) for each, key in zip(dense, keys, strict=True)]
    token = devices._PLACE.set(Place("cpu", True, wide, batched=True))
    try:
        found = truncated_svds(dense, rank, keys)
    finally:
        devices._PLACE.reset(token)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.s, other.s, rtol=1e-5)
        assert torch.allclose(product(one), product(other), atol=2e-4)


def test_without_a_batch_they_go_one_by_one(matrix: Matrix) -> None:
    made = [matrix("tall", seed)[0] for seed in range(2)]
    found = truncated_svds(made, 5, [1, 2])
    for one, dense, key in zip(found, made, (1, 2), strict=True):
        alone = truncated_svd(dense, 5, key)
        assert torch.equal(one.u, alone.u) and torch.equal(one.v, alone.v)


@pytest.mark.parametrize("batched", [False, True])
def test_what_fp32_cannot_tell_is_computed_again(batched: bool) -> None:
    """Singular values from 1 to 1e-5: their squares reach below what fp32 can hold beside 1."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(60, 30, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(40, 30, generator=generator)).Q
    steep = DenseMatrix((u * torch.logspace(0, -5, 30)) @ v.T)
    flat = DenseMatrix((u * torch.linspace(2, 1, 30)) @ v.T)
    for dense, again in ((steep, 2), (flat, None)):
        chosen = Place("cpu", True, "float32", batched=batched)
        token = devices._PLACE.set(chosen)
        try:
            found = truncated_svds([dense, dense], 30, [0, 0])
        finally:
            devices._PLACE.reset(token)
        assert chosen.notes.get("again_in_fp64") == again
        for each in found:
            assert torch.allclose(each.u.T @ each.u, torch.eye(30), atol=1e-3)
            assert torch.allclose(product(each), dense.values, atol=1e-5)


@pytest.mark.parametrize("known", ["full", "diagonal", "nothing"])
def test_whitened_factors_elsewhere(known: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 30, generator=generator)
    inputs = torch.randn(200, 30, generator=generator)
    second = inputs.T @ inputs / 200
    moments = Moments(second if known == "full" else second.diagonal(), inputs.mean(0), 200)
    gram = None if known == "nothing" else moments.second
    wanted = whitened_svd(weight, gram, 8, 5)
    with pretending(), computing("cuda"):
        made = whitened_svd(weight, gram, 8, 5)
    assert made.q.device.type == "cpu"
    assert torch.allclose(made.q @ made.a, wanted.q @ wanted.a, atol=1e-9)
