"""Verbs with `device="cuda"`: on a pretended GPU, which refuses tensors that lie elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PairFiles, read_checkpoint, tree_hashes
from pretend_gpu import pretending

from deltafold import compress, export, restore
from deltafold.codecs import get, names
from deltafold.compressing import triplets as factor_step
from deltafold.errors import ResumeError
from deltafold.running import devices
from deltafold.running.record import read_record

FACTORED = ["lowrank", "svd-quant", "impart", "impart-qt", "delta-come"]


def compressed(pair: PairFiles, output: Path, method: str, **options: Any) -> dict[str, Any]:
    return compress(pair.base, pair.finetuned, output, method, overwrite=True, **options)


def restored(
    archive: Path, pair: PairFiles, output: Path, **options: Any
) -> dict[str, torch.Tensor]:
    restore(archive, pair.base, output, overwrite=True, **options)
    return read_checkpoint(output)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], base: Path) -> float:
    """Relative to the delta of `other`."""
    before = read_checkpoint(base)
    gap = sum(float((one[k].float() - other[k].float()).square().sum()) for k in other)
    size = sum(
        float((other[k].float() - before[k].float()).square().sum())
        for k in other
        if k in before and before[k].shape == other[k].shape
    )
    return (gap / size) ** 0.5


@pytest.mark.integration
@pytest.mark.parametrize("method", [name for name in names() if get(name).method])
def test_every_method(method: str, pair: PairFiles, tmp_path: Path) -> None:
    """The same archive up to rounding, restored to the same model up to rounding."""
    options: dict[str, Any] = {"file_ratio": 8} if get(method).lossy else {}
    on_cpu = compressed(pair, tmp_path / "cpu.delta", method, **options)
    with pretending():
        on_gpu = compressed(pair, tmp_path / "gpu.delta", method, device="cuda", **options)
        found = restored(tmp_path / "gpu.delta", pair, tmp_path / "gpu", device="cuda")
    wanted = restored(tmp_path / "cpu.delta", pair, tmp_path / "cpu")
    assert "device" not in on_cpu and on_cpu["machine"]["device"] == "cpu"
    assert on_gpu["device"] == {
        "name": "pretend:0", "model": "Pretended GPU", "linear_algebra": "float64",
    }  # fmt: skip
    assert on_gpu["machine"]["device"] == "Pretended GPU (pretend:0)"
    assert on_gpu["totals"]["archive_bytes"] == on_cpu["totals"]["archive_bytes"]
    assert distance(found, wanted, pair.base) < 0.01


@pytest.mark.parametrize("method", FACTORED)
def test_the_same_device_gives_the_same_bytes(method: str, pair: PairFiles, tmp_path: Path) -> None:
    with pretending():
        for name, workers in (("one", 1), ("two", 2)):
            compressed(
                pair, tmp_path / f"{name}.delta", method, file_ratio=8, device="cuda",
                workers=workers,
            )  # fmt: skip
    assert tree_hashes(tmp_path / "one.delta") == tree_hashes(tmp_path / "two.delta")


def test_pieces_of_one_shape_are_factored_together(
    pair: PairFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    found: list[list[int]] = []
    real = factor_step.truncated_svds

    def counted(matrices: Any, rank: int, keys: Any) -> Any:
        sizes.append(len(matrices))
        return real(matrices, rank, keys)

    monkeypatch.setattr(factor_step, "truncated_svds", counted)
    compressed(pair, tmp_path / "cpu.delta", "lowrank", file_ratio=8)
    assert set(sizes) == {1}
    alone = len(sizes)
    sizes.clear()
    with pretending():
        for workers in (1, 3):  # a batch of another size might round differently
            compressed(
                pair, tmp_path / "gpu.delta", "lowrank", file_ratio=8, device="cuda",
                workers=workers,
            )  # fmt: skip
            assert max(sizes) > 1 and sum(sizes) == alone
            found.append(sorted(sizes))
            sizes.clear()
    assert found[0] == found[1]


def test_a_gpu_with_slow_fp64_says_what_was_computed_again(pair: PairFiles, tmp_path: Path) -> None:
    with pretending(capability=(8, 9)):
        record = compressed(pair, tmp_path / "x.delta", "impart", file_ratio=8, device="cuda")
    assert record["device"]["linear_algebra"] == "float32"
    assert read_record(tmp_path / "x.delta")["device"] == record["device"]


def test_unfinished_work_of_another_device_is_refused(
    pair: PairFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "x.delta"
    with monkeypatch.context() as patch:
        patch.setattr("deltafold.compressing.compress.assemble", broken)
        with pytest.raises(KeyboardInterrupt):
            compressed(pair, output, "lowrank", file_ratio=8)
    with pretending(), pytest.raises(ResumeError, match=r"other inputs or settings \(device\)"):
        compressed(pair, output, "lowrank", file_ratio=8, device="cuda")


@pytest.mark.integration
def test_an_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from tiny_models import write_family

    base, finetuned = write_family(tmp_path, "llama")
    compress(base, finetuned, tmp_path / "x.delta", "auto", file_ratio=6, calibration="none")
    export(tmp_path / "x.delta", tmp_path / "cpu", base=base, rank=6)
    with pretending():
        record = export(tmp_path / "x.delta", tmp_path / "gpu", base=base, rank=6, device="cuda")
    assert record["device"]["name"] == "pretend:0"
    one, other = (load_file(tmp_path / k / "adapter_model.safetensors") for k in ("cpu", "gpu"))
    for name in (n.removesuffix("lora_A.weight") for n in one if "lora_A" in n):
        wanted, found = (
            each[f"{name}lora_B.weight"].float() @ each[f"{name}lora_A.weight"].float()
            for each in (one, other)
        )
        assert float((found - wanted).norm() / wanted.norm()) < 0.02
    settings = json.loads((tmp_path / "gpu" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"


def test_the_place_is_left_when_a_verb_ends(pair: PairFiles, tmp_path: Path) -> None:
    with pretending():
        compressed(pair, tmp_path / "x.delta", "lowrank", file_ratio=8, device="cuda")
    assert devices.place().name == "cpu"
