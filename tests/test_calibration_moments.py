"""Moments of layers' inputs: against ordinary hooks on a whole model, on disk, and interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import make_llama, make_tokenizer, save, write_rows
from tiny_models import FAMILIES, build, tune
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltafold.calibration import Calibration, Sampling, calibrate
from deltafold.calibration import measure as measure_module
from deltafold.calibration.accumulate import full_bytes
from deltafold.calibration.batches import Sample
from deltafold.calibration.kept import cache_folder
from deltafold.checkpoint import open_checkpoint
from deltafold.errors import MismatchError, NonFiniteError, StorageError

Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("family")
            model = build(family)
            tune(model)
            model.save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    lengths = (20, 19, 33, 40, 40, 12)
    return [
        Sample(tuple(torch.randint(3, 160, (n,), generator=generator).tolist()), 1 + n // 2)
        for n in lengths
    ]


def seen_inputs(folder: Path, samples: list[Sample]) -> Inputs:
    """Inputs (n, i) of every linear layer of the whole model, by parameter, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

        return hook

    def note_experts(path: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            hidden, chosen = args[0], args[1]
            seen.setdefault(f"{path.removesuffix('experts')}gate.weight", []).append(hidden)
            for expert in range(module.num_experts):
                rows = hidden[(chosen == expert).any(-1)]
                gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                seen.setdefault(f"{path}.{expert}.up", []).append(rows)
                seen.setdefault(f"{path}.{expert}.down", []).append(module.act_fn(gate) * up)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(note(f"{name}.weight"))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(note_experts(name))
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([sample.ids]))
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


# What the parameters of experts are called in checkpoints.
EXPERTS = {
    "mixtral": (".block_sparse_moe.", ("w1", "w3"), "w2"),
    "qwen2 moe": (".mlp.", ("gate_proj", "up_proj"), "down_proj"),
}


def wanted_inputs(family: str, folder: Path, samples: list[Sample]) -> Inputs:
    """`seen_inputs` by checkpoint tensor."""
    found: Inputs = {}
    for name, rows in seen_inputs(folder, samples).items():
        path, _, kind = name.rpartition(".")
        if kind in ("up", "down") and ".experts." in path:
            place, ups, down = EXPERTS[family]
            path = path.replace(".mlp.", place)
            for each in ups if kind == "up" else (down,):
                found[f"{path}.{each}.weight"] = rows
        else:
            place = EXPERTS.get(family, (".mlp.",))[0]
            found[name.replace(".mlp.gate.", f"{place}gate.")] = rows
    if "lm_head.weight" not in open_checkpoint(folder).tensors:
        head = found.pop("lm_head.weight")
        tied = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
        found[tied] = head
    return found


@pytest.mark.integration
@pytest.mark.parametrize("family", list(FAMILIES))
def test_moments_are_those_that_hooks_see(
    folder_of: Any, samples: list[Sample], tmp_path: Path, family: str
) -> None:
    folder = folder_of(family)
    calibration = calibrate(folder, samples, cache=tmp_path)
    checked = 0
    for name, rows in wanted_inputs(family, folder, samples).items():
        moments = calibration.moments(name)
        if not len(rows):
            assert moments is None
            continue
        assert moments is not None, name
        assert moments.tokens == len(rows)
        assert moments.second.dtype == moments.mean.dtype == torch.float32
        second = rows.T @ rows / len(rows)
        assert torch.allclose(moments.second.double(), second, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(moments.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-6), name
        checked += 1
    matrices = {
        name
        for name, info in open_checkpoint(folder).tensors.items()
        if len(info.shape) == 2 and ("embed" not in name and ".wpe" not in name)
    }
    assert matrices - {"transformer.wte.weight"} <= set(calibration.names)
    assert checked == len(calibration.names)
    axes = {calibration.input_axis(name) for name in calibration.names}
    assert axes == ({0, 1} if family == "gpt2" else {1})


def test_layers_with_the_same_input_share_an_entry(
    folder_of: Any, samples: list[Sample], tmp_path: Path
) -> None:
    calibration = calibrate(folder_of("llama"), samples, cache=tmp_path)
    block = "model.layers.0."
    entry = {
        name.removeprefix(block).removesuffix("_proj.weight"): place["entry"]
        for name, place in calibration._places.items()
        if name.startswith(block)
    }
    assert entry["self_attn.q"] == entry["self_attn.k"] == entry["self_attn.v"]
    assert entry["mlp.gate"] == entry["mlp.up"]
    assert len(set(entry.values())) == 4
    assert sorted(file.name for file in calibration.folder.iterdir()) == [
        "block-00000.safetensors", "block-00001.safetensors", "head.safetensors", "index.json",
        "samples.json",
    ]  # fmt: skip


def test_diagonals(folder_of: Any, samples: list[Sample], tmp_path: Path) -> None:
    full = calibrate(folder_of("llama"), samples, cache=tmp_path)
    diagonal = calibrate(folder_of("llama"), samples, cache=tmp_path, full=False)
    assert full.folder != diagonal.folder
    for name in full.names:
        whole, part = full.moments(name), diagonal.moments(name)
        assert whole is not None and part is not None
        assert part.second.shape == part.mean.shape
        assert torch.allclose(whole.second.diagonal(), part.second, rtol=1e-5)
        assert torch.equal(whole.mean, part.mean)


def test_what_memory_cannot_take_is_a_diagonal(
    folder_of: Any, samples: list[Sample], tmp_path: Path
) -> None:
    """Room for two moments of width 64: the first two inputs of each block get them."""
    room = 2 * 2 * full_bytes(64)
    calibration = calibrate(folder_of("llama"), samples, cache=tmp_path, memory_bytes=room)
    dims = {}
    for name in calibration.names:
        moments = calibration.moments(name)
        assert moments is not None
        if ".layers.1." in name:
            dims[name.split(".")[-2]] = moments.second.dim()
    assert dims == {
        "q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2,
        "gate_proj": 1, "up_proj": 1, "down_proj": 1,
    }  # fmt: skip
    assert calibration.summary()["diagonal_moments"] == 4


def test_it_is_found_again(
    folder_of: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")
    first = calibrate(folder, samples, cache=tmp_path / "cache")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure_module.Measurement, "running", refuse)
    again = calibrate(folder, samples, cache=tmp_path / "cache")
    assert again.folder == first.folder and again.summary() == first.summary()
    for changed in (
        {"full": False},
        {"restart": True},
    ):
        with pytest.raises(AssertionError, match="measured again"):
            calibrate(folder, samples, cache=tmp_path / "cache", **changed)
    with pytest.raises(AssertionError, match="measured again"):
        calibrate(folder, samples[:3], cache=tmp_path / "cache")
    (folder / "model.safetensors").touch()
    with pytest.raises(AssertionError, match="measured again"):
        calibrate(folder, samples, cache=tmp_path / "cache")


def files(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.glob("*.safetensors")}


def test_an_interrupted_run_keeps_its_blocks(
    folder_of: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(calibrate(folder_of("mixtral"), samples, cache=tmp_path / "whole").folder)

    def stop(self: Any, done: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure_module.Measurement, "head", stop)
        calibrate(folder_of("mixtral"), samples, cache=tmp_path / "cut")
    (folder,) = (each for each in (tmp_path / "cut").iterdir() if each.is_dir())
    assert set(whole) - set(files(folder)) == {"head.safetensors"}
    (folder / "block-00000.safetensors").write_bytes(b"cut off")
    kept = (folder / "block-00001.safetensors").stat().st_mtime_ns
    calibration = calibrate(folder_of("mixtral"), samples, cache=tmp_path / "cut")
    assert calibration.folder == folder
    assert (folder / "block-00001.safetensors").stat().st_mtime_ns == kept
    assert files(folder) == whole
    assert [each.name for each in folder.glob("*.tmp")] == []


def test_same_inputs_same_bytes(folder_of: Any, samples: list[Sample], tmp_path: Path) -> None:
    one = calibrate(folder_of("qwen2"), samples, cache=tmp_path / "one")
    two = calibrate(folder_of("qwen2"), samples, cache=tmp_path / "two")
    assert files(one.folder) == files(two.folder) and one.folder.name == two.folder.name


def test_from_a_file_and_from_the_model_itself(tmp_path: Path) -> None:
    folder = save(make_llama(1), tmp_path / "model", make_tokenizer(begins=True))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "2+2=", "answer": "4"}] * 4)
    steps: list[Any] = []
    calibration = calibrate(
        folder, Sampling(rows, samples=3), cache=tmp_path, progress=steps.append
    )
    assert calibration.samples == [Sample(calibration.samples[0].ids, 5)] * 3
    summary = calibration.summary()
    assert (summary["samples"], summary["tokens"], summary["counted_tokens"]) == (3, 18, 3)
    assert summary["source"] == str(rows) and summary["tensors_measured"] == 15
    assert summary["disk_bytes"] == sum(map(len, files(calibration.folder).values()))
    assert [(step.name, step.done, step.total) for step in steps] == [
        ("model.layers.0", 1, 3), ("model.layers.1", 2, 3), ("head", 3, 3)
    ]  # fmt: skip
    own = calibrate(folder, Sampling("self", samples=3, max_tokens=9), cache=tmp_path)
    assert len(own.samples) == 3 and max(len(each.ids) for each in own.samples) <= 9
    (kept,) = tmp_path.glob("self-*.json")
    rows_kept = json.loads(kept.read_text())["value"]
    assert [tuple(row["ids"]) for row in rows_kept] == [each.ids for each in own.samples]
    assert (
        calibrate(folder, Sampling("self", samples=3, max_tokens=9), cache=tmp_path).folder
        == own.folder
    )


def test_a_file_that_is_cut_off_later(
    folder_of: Any, samples: list[Sample], tmp_path: Path
) -> None:
    calibration = calibrate(folder_of("llama"), samples, cache=tmp_path)
    file = calibration.folder / "block-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StorageError, match=r"block-00000.safetensors"):
        calibration.moments("model.layers.0.self_attn.q_proj.weight")
    assert calibration.moments("model.norm.weight") is None


def test_weights_that_give_nan(samples: list[Sample], tmp_path: Path, folder_of: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folder_of("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"NaN or infinite values in model.layers.1"):
        calibrate(folder, samples, cache=tmp_path / "cache")


def test_no_samples(folder_of: Any, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no samples"):
        calibrate(folder_of("llama"), [], cache=tmp_path)


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "there"))
    assert cache_folder(None) == tmp_path / "there" / "calibration"
    monkeypatch.delenv("DELTAFOLD_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "deltafold" / "calibration"


def test_experts_stored_together_share_one_entry(tmp_path: Path, samples: list[Sample]) -> None:
    """Where the checkpoint itself holds all experts in one tensor, their inputs are one."""
    from deltafold.calibration.accumulate import Entries, Watch

    together = nn.Parameter(torch.randn(3, 8, 4), requires_grad=False)
    first, second = torch.randn(5, 4), torch.randn(2, 4)
    entries = Entries(True, 1 << 20)
    with Watch(entries, {"experts": together}, lambda path, expert: (path,)):
        nn.functional.linear(first, together[0])
        nn.functional.linear(second, together[2])
    assert entries.of_tensor == {"experts": 0}
    rows = torch.cat([first, second])
    assert torch.allclose(entries.sums[0].moments().second, rows.T @ rows / 7, rtol=1e-5)


def test_summary_is_plain_json(folder_of: Any, samples: list[Sample], tmp_path: Path) -> None:
    calibration: Calibration = calibrate(folder_of("llama"), samples, cache=tmp_path)
    summary = calibration.summary()
    assert json.loads(json.dumps(summary)) == summary and "tensors" not in summary
    assert summary["full_moments"] == 9 and summary["diagonal_moments"] == 0
    assert summary["seconds"] > 0 and summary["peak_memory_bytes"] > 0
