"""Text on a pretended GPU: moments, what errors cost, gradients; and when it is run in bf16."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import decaying_delta, read_checkpoint
from folding_models import write_deep, write_text
from pretend_gpu import NAME, pretending
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build

from deltafold import compress, factor, fold, share
from deltafold.calibration import Judge, Sample, StreamedModel, calibrate, precision
from deltafold.calibration.fisher import _drawn_by_runs, drawn, measure_fisher
from deltafold.codecs import delta_codec
from deltafold.linalg.matrices import DenseMatrix, Moments
from deltafold.running import devices
from deltafold.running.devices import Place, computing

TOKENS = torch.Generator().manual_seed(5)
SAMPLES = [
    Sample(tuple(torch.randint(3, 160, (n,), generator=TOKENS).tolist()), 1 + n // 3)
    for n in (20, 19, 33, 20)
]


@contextmanager
def plain_place(**settings: Any) -> Iterator[Place]:
    """The CPU with a GPU's choices."""
    chosen = Place("cpu", True, **settings)
    token = devices._PLACE.set(chosen)
    try:
        yield chosen
    finally:
        devices._PLACE.reset(token)


def saved(folder: Path, family: str) -> Path:
    build(family).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def exact_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes is held against full precision."""
    monkeypatch.setattr("deltafold.calibration.stream.multiplies_bf16", lambda device: False)


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_weighed_and_measured(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, so that the numbers must be those of the CPU."""
    folder = saved(tmp_path / "model", family)
    monkeypatch.setattr(precision, "MOST_KL", -1.0)
    costs = measure_fisher(folder, SAMPLES, cache=tmp_path / "cpu")
    moments = calibrate(folder, SAMPLES, cache=tmp_path / "cpu")
    with pretending(), computing("cuda") as place:
        costs_there = measure_fisher(folder, SAMPLES, cache=tmp_path / "gpu")
        moments_there = calibrate(folder, SAMPLES, cache=tmp_path / "gpu")
        assert place.notes["text"]["dtype"] == "fp32"
    assert set(costs) == set(costs_there) and moments.names == moments_there.names
    for name, one in costs.items():
        assert torch.allclose(one.rows, costs_there[name].rows, rtol=1e-3, atol=1e-9), name
        assert torch.allclose(one.columns, costs_there[name].columns, rtol=1e-3, atol=1e-9), name
    for name in moments.names:
        one, other = moments.moments(name), moments_there.moments(name)
        assert one is not None and other is not None and other.second.device.type == "cpu"
        assert torch.allclose(one.second, other.second, rtol=1e-3, atol=1e-6), name


@pytest.mark.integration
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bf16_on_the_pretended_gpu_is_near(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family)
    costs = measure_fisher(folder, SAMPLES, cache=tmp_path / "cpu")
    with pretending(), computing("cuda") as place:
        found = measure_fisher(folder, SAMPLES, cache=tmp_path / "gpu")
    assert place.notes["text"]["dtype"] == "bf16"
    for name, one in costs.items():
        gap = (one.columns - found[name].columns).norm() / one.columns.norm()
        assert float(gap) < 0.1, name


def test_bf16_is_left_where_it_predicts_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StreamedModel(saved(tmp_path / "model", "llama"))
    assert precision.settled(model, SAMPLES) is model  # nobody asked for a GPU
    with plain_place(text_bf16=True) as place:
        quick = precision.settled(model, SAMPLES)
        assert quick.skeleton.dtype == torch.bfloat16 and model.skeleton.dtype == torch.float32
        kl = place.notes["text"]["kl_of_bf16"]
        assert 0 < kl < precision.MOST_KL and place.notes["text"]["dtype"] == "bf16"
        monkeypatch.setattr(precision, "MOST_KL", kl / 2)
        assert precision.settled(model, SAMPLES) is model
        assert place.notes["text"] == {"dtype": "fp32", "kl_of_bf16": kl, "at_most": kl / 2}


def test_fp32_weights_stay_fp32(tmp_path: Path) -> None:
    build("llama").float().save_pretrained(tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    with plain_place(text_bf16=True) as place:
        assert precision.settled(model, SAMPLES) is model and not place.notes


@pytest.mark.parametrize("vocabulary", [7, 256, 1000])
def test_tokens_are_drawn_alike_by_runs(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(64, vocabulary, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    p[:, 3] = 0.0  # a token that cannot be drawn
    level = torch.rand(64, 1, generator=generator, dtype=torch.float64)
    level[0], level[1] = 0.0, 1 - 2.0**-53
    plain = drawn(p, level)
    assert torch.equal(_drawn_by_runs(p, level), plain)
    assert len(plain.unique()) > 3 and 3 not in plain


def test_fed_rounding_elsewhere() -> None:
    """`auto` with moments: each column's errors fed to those that follow."""
    generator = torch.Generator().manual_seed(2)
    delta = DenseMatrix(0.01 * torch.randn(24, 16, generator=generator))
    inputs = torch.randn(300, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    moments = Moments(inputs.T @ inputs / 300, inputs.mean(0), 300)
    codec, settings = delta_codec("auto", {}), {"step": 1.0, "n_bytes": 0}
    _, wanted = codec.encode(delta, settings, 7, None, moments)
    _, unfed = codec.encode(delta, settings, 7)
    with pretending(), computing("cuda"):
        _, found = codec.encode(delta, settings, 7, None, moments)
    assert torch.equal(found["code"], wanted["code"])
    assert not torch.equal(found["code"], unfed["code"])


@pytest.mark.integration
def test_a_judge_says_the_same(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")

    def changed(name: str) -> torch.Tensor:
        held = model.checkpoint.tensor(name).float()
        return held * 1.05 if "mlp" in name else held

    found = []
    model = StreamedModel(folder)
    with Judge(model, None, SAMPLES) as judge:
        found.append(judge.compare(changed))
    with pretending(), computing("cuda"):
        model = StreamedModel(folder)
        with Judge(model, None, SAMPLES) as judge:
            assert judge._teacher.device.type == "pretend" and not judge._teacher.on_disk
            found.append(judge.compare(changed))
    assert found[0].kl == pytest.approx(found[1].kl, rel=1e-3)
    assert found[0].agreement == found[1].agreement


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd-quant", {}),
        ("lowrank", {"distill": 2}),
    ],
)
def test_compress_with_text(
    method: str, options: dict[str, Any], tmp_path: Path, tuned: tuple[Path, Path]
) -> None:
    """Moments, what errors cost, and training."""
    base, finetuned = tuned
    text = write_text(tmp_path / "text.txt", 80)
    options = {"calibration": text, "max_tokens": 40} | options
    options["file_ratio"] = 6
    on_cpu = compress(base, finetuned, tmp_path / "cpu.delta", method, **options)
    with pretending():
        there = compress(base, finetuned, tmp_path / "x.delta", method, device="cuda", **options)
    assert there["device"]["name"] == NAME
    ratio = on_cpu["totals"]["file_ratio"]
    assert there["totals"]["file_ratio"] == pytest.approx(ratio, rel=0.05)
    for key in ("kl_before", "kl_after") if "distill" in options else ():
        assert there["distill"][key] == pytest.approx(on_cpu["distill"][key], rel=0.1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tuned")
    base = write_deep(folder / "base", "llama", 2)
    shutil.copytree(base, folder / "finetuned")
    generator = torch.Generator().manual_seed(1)
    weights = load_file(base / "model.safetensors")
    moved = {
        name: (held.float() + decaying_delta(tuple(held.shape), generator)).to(held.dtype)
        if held.ndim == 2
        else held
        for name, held in weights.items()
    }
    save_file(moved, folder / "finetuned" / "model.safetensors", {"format": "pt"})
    return base, folder / "finetuned"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return write_deep(folder / "model", "llama"), write_text(folder / "text.txt", 12)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["lord", "basis-sharing", "bolaco", "welore"])
def test_factor(method: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = llama
    options: dict[str, Any] = {"parameters": 0.9, "calibration": text, "measure": text,
                               "max_tokens": 40}  # fmt: skip
    if method == "bolaco":
        options["trials"] = 6  # five at random, then one that the search chooses
    on_cpu = factor(model, tmp_path / "cpu", method, **options)
    with pretending():
        on_gpu = factor(model, tmp_path / "gpu", method, device="cuda", **options)
    assert on_gpu["device"]["name"] == NAME
    one, other = (each["quality"]["factored"]["kl"] for each in (on_cpu, on_gpu))
    if method != "bolaco":
        assert other == pytest.approx(one, rel=0.02)
        return
    # A search ends at other ranks where trials are about as good: those of the same ranks are compared.
    trials = [each["search"]["trials"][:5] for each in (on_cpu, on_gpu)]
    assert len(trials[0]) == 5
    for mine, theirs in zip(*trials, strict=True):
        assert theirs["shares"] == mine["shares"]
        assert theirs["kl"] == pytest.approx(mine["kl"], rel=0.05)
    chosen = min(on_gpu["search"]["trials"], key=lambda each: each["objective"])
    assert other == pytest.approx(chosen["kl"], rel=0.2)  # written in bf16


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("auto", {}),
        ("mka", {}),
        ("replaceme", {}),
        ("shortgpt", {"closed_form": "through"}),
        ("linearpatch-scale", {}),
        ("replaceme-cosine", {}),
        ("come", {}),
    ],
)
def test_fold(
    method: str, options: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path
) -> None:
    model, text = llama
    options = {"blocks": 1, "calibration": text, "measure": text, "max_tokens": 40} | options
    on_cpu = fold(model, tmp_path / "cpu", method, **options)
    with pretending():
        on_gpu = fold(model, tmp_path / "gpu", method, device="cuda", **options)
    assert on_gpu["device"]["name"] == NAME
    one, other = (each["quality"]["folded"]["kl"] for each in (on_cpu, on_gpu))
    assert other == pytest.approx(one, rel=0.05)


@pytest.mark.integration
def test_share_starts_alike(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Training is not tried here: torch does not let a parameter become a pretended one."""
    model, _ = llama
    options: dict[str, Any] = {"shared": 1, "rank": 4, "protect": (0, -1), "steps": 0}
    share(model, tmp_path / "cpu", **options)
    with pretending():
        record = share(model, tmp_path / "gpu", device="cuda", **options)
    assert record["device"]["name"] == NAME
    one, other = (read_checkpoint(tmp_path / name) for name in ("cpu", "gpu"))
    assert set(one) == set(other)
    for name in one:
        if name.endswith(".a"):
            outer = name.removesuffix("a") + "b"
            wanted, found = (each[outer].float() @ each[name].float() for each in (one, other))
            assert float((found - wanted).norm()) <= 0.02 * float(wanted.norm()), name
        elif not name.endswith(".b"):
            assert torch.equal(one[name], other[name]), name
