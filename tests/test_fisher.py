"""What errors cost: against ordinary autograd on a whole model; kept, found again, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import make_llama, make_tokenizer, nudged, save
from tiny_models import build, tune
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltafold import compress, restore
from deltafold.calibration import Sample
from deltafold.calibration import fisher as module
from deltafold.calibration.fisher import measure_fisher
from deltafold.calibration.samples import SampleError
from deltafold.errors import NonFiniteError
from deltafold.linalg.matrices import Fisher


def made_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    return [
        Sample(tuple(torch.randint(3, 160, (n,), generator=generator).tolist()), 1 + n // 3)
        for n in (20, 19, 33, 20)
    ]


def by_autograd(folder: Path, samples: list[Sample]) -> dict[str, Fisher]:
    """Rows and columns of every linear layer, with the likeliest token in place of a drawn one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    axes: dict[str, int] = {}
    likely, shares, entering = torch.zeros(()), torch.zeros(()), []

    for name, each in model.named_modules():
        if isinstance(each, nn.Linear | Conv1D):
            axes[f"{name}.weight"] = int(isinstance(each, nn.Linear))

            def hook(_: Any, args: Any, output: torch.Tensor, name: str = f"{name}.weight") -> None:
                inputs.setdefault(name, []).append(args[0].detach().flatten(0, -2))
                if output.requires_grad:
                    output.register_hook(
                        lambda g: outputs.setdefault(name, []).append(g.flatten(0, -2))
                    )

            each.register_forward_hook(hook)

    def enters(_: Any, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda g: entering.append(g.flatten(0, -2)))

    model.get_input_embeddings().register_forward_hook(enters)
    counted = sum(sample.counted for sample in samples)
    for sample in samples:
        ids = torch.tensor([sample.ids])
        logits = model(ids).logits[0, sample.start - 1 : -1]
        p = logits.detach().softmax(-1)
        likely = likely + (p * (1 - p)).sum(0)
        shares = shares + torch.bincount(ids[0], minlength=p.shape[-1])
        torch.nn.functional.cross_entropy(logits, p.argmax(-1), reduction="sum").backward()
    found = {}
    for name in inputs:
        if name == "lm_head.weight":  # predictions that do not count are not made
            kept = zip(inputs[name], samples, strict=True)
            inputs[name] = [rows[sample.start - 1 : -1] for rows, sample in kept]
        columns = torch.cat(inputs[name]).square().mean(0)
        rows = torch.cat(outputs[name]).square().sum(0) / counted
        if name == "lm_head.weight":
            rows = likely / counted
        found[name] = Fisher(rows, columns) if axes[name] else Fisher(columns, rows)
    columns = torch.cat(entering).square().sum(0) / counted
    found["in"] = Fisher(shares / shares.sum(), columns)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3", "mixtral"])
def test_it_is_what_autograd_gives(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    tune(model)
    model.save_pretrained(tmp_path / "m")

    def likeliest(self: Any, first: int, logits: torch.Tensor) -> torch.Tensor:
        p = logits.double().softmax(-1)
        self.likely += (p * (1 - p)).sum(0)
        return p.argmax(-1)

    monkeypatch.setattr(module._Measurement, "_draw", likeliest)
    samples = made_samples()
    found = measure_fisher(tmp_path / "m", samples, cache=tmp_path / "cache")
    wanted = by_autograd(tmp_path / "m", samples)
    entering = wanted.pop("in")
    head = wanted.pop("lm_head.weight")
    names = {name.removeprefix("transformer.") for name in wanted if "gate.weight" not in name}
    assert len(names) >= 4
    for name in sorted(names):
        whole = wanted.get(name) or wanted[f"transformer.{name}"]
        ours = found.get(name) or found[f"transformer.{name}"]
        assert_close(ours, whole)
    embedding = next(n for n in found if "embed_tokens" in n or "wte" in n)
    if "lm_head.weight" in found:
        assert_close(found["lm_head.weight"], head)
        assert_close(found[embedding], entering)
    else:  # tied: both uses in one
        ratio = entering.columns.mean() / head.columns.mean()
        both = Fisher(head.rows + entering.rows * ratio, head.columns)
        assert_close(found[embedding], both, 5e-2 if family == "gpt2" else 1e-3)


def assert_close(ours: Fisher, wanted: Fisher, tolerance: float = 1e-3) -> None:
    for a, b in ((ours.rows, wanted.rows), (ours.columns, wanted.columns)):
        assert torch.allclose(a, b.float(), rtol=tolerance, atol=tolerance * float(b.mean()))


def test_draws_follow_the_predictions(tmp_path: Path) -> None:
    """Over many rows tokens come as often as the model says; the same for the same seed."""
    folder = save(make_llama(1), tmp_path / "m", make_tokenizer())
    model = module.StreamedModel(folder)
    one = module._Measurement(model, made_samples()[:1], 0, None)
    p = torch.tensor([0.5, 0.3, 0.0, 0.2])
    logits = p.log().expand(20_000, 4)
    one.likely = torch.zeros(4, dtype=torch.float64)
    found = one._draw(0, logits)
    shares = torch.bincount(found, minlength=4) / 20_000
    assert torch.allclose(shares, p, atol=0.015) and shares[2] == 0
    assert torch.equal(found[7:9], one._draw(7, logits[:2]))
    assert torch.allclose(one.likely[:4], 20_002 * (p * (1 - p)).double(), rtol=1e-4)


def test_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(make_llama(1), tmp_path / "m", make_tokenizer())
    first = measure_fisher(folder, "general", cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("fisher-*")
    monkeypatch.setattr(module._Measurement, "run", lambda self: {})
    again = measure_fisher(folder, "general", cache=tmp_path / "cache")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[n].rows, first[n].rows) for n in first)
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: measured anew
    assert measure_fisher(folder, "general", cache=tmp_path / "cache") == {}


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    model = make_llama(1)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    folder = save(model, tmp_path / "m", make_tokenizer())
    with pytest.raises(NonFiniteError, match="damaged"):
        measure_fisher(folder, "general", cache=tmp_path / "cache")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("DELTAFOLD_CACHE", str(tmp_path / "cache"))
    base = save(make_llama(1), tmp_path / "base", make_tokenizer())
    tuned = save(nudged(make_llama(1), 2, 0.1), tmp_path / "tuned", make_tokenizer())
    return base, tuned


def test_compress_weighs_by_default(pair: tuple[Path, Path], tmp_path: Path) -> None:
    record = compress(*pair, tmp_path / "a.delta", file_ratio=4)
    assert record["calibration"] == {"source": "general", "matrices_weighed": 16}
    plain = compress(*pair, tmp_path / "b.delta", file_ratio=4, calibration="none")
    assert plain["calibration"] == {"source": None}
    even = compress(*pair, tmp_path / "c.delta", file_ratio=4, uniform=True)
    even_errors, errors = ([row["relative_error"] for row in r["tensors"]] for r in (even, plain))
    assert even_errors == errors
    restore(tmp_path / "a.delta", pair[0], tmp_path / "out")


def test_a_fine_tune_that_cannot_be_run_is_compressed_all_the_same(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (pair[1] / "tokenizer.json").unlink()
    (pair[1] / "tokenizer_config.json").unlink()
    record = compress(*pair, tmp_path / "a.delta", file_ratio=4)
    assert "no tokenizer" in record["calibration"]["why"]
    config = (pair[1] / "config.json").read_text()
    (pair[1] / "tokenizer.json").write_text("{}")
    for folder in pair:
        (folder / "config.json").write_text(config.replace('"llama"', '"no such model"'))
    record = compress(*pair, tmp_path / "b.delta", file_ratio=4)
    assert "cannot be run" in record["calibration"]["why"]


def test_text_that_is_asked_for_must_be_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="nowhere"):
        compress(*pair, tmp_path / "a.delta", file_ratio=4, calibration="nowhere.txt")
