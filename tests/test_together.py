"""Fine-tunes over one copy of the base, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny_models import build, tune

import deltafold
from deltafold.errors import UsageError

pytestmark = pytest.mark.integration
FAMILIES = ["llama tied", "qwen3", "gemma3", "phi3"]
ROWS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module", params=FAMILIES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base, and lossless archives of two fine-tunes."""
    folder = tmp_path_factory.mktemp("together")
    build(request.param).save_pretrained(folder / "base")
    for seed, name in enumerate(("math", "sql"), start=1):
        model = build(request.param)
        tune(model, seed)
        model.save_pretrained(folder / name)
        deltafold.compress(folder / "base", folder / name, folder / f"{name}.delta", "lossless")
    return folder


def together(folder: Path, **more: Any) -> Any:
    deltas = {name: folder / f"{name}.delta" for name in ("math", "sql")}
    return deltafold.load(folder / "base", deltas=deltas, dtype=torch.float32, **more)


def alone(folder: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()


def logits(model: Any, rows: torch.Tensor = ROWS, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(rows, **more).logits


def test_each_answers_as_itself(files: Path) -> None:
    model = together(files)
    own = {name: logits(alone(files, name)) for name in ("base", "math", "sql")}
    gap = float((own["math"] - own["sql"]).norm())
    assert torch.allclose(logits(model), own["base"], atol=1e-5)  # nothing asked: the base
    for name in ("math", "sql", "math"):
        with model.using(name):
            here = logits(model)
        assert float((here - own[name]).norm()) < 0.1 * gap, name
    with model.using("math"):
        with model.using("sql"):
            inner = logits(model)
        outer = logits(model)
    assert float((inner - own["sql"]).norm()) < 0.1 * gap
    assert float((outer - own["math"]).norm()) < 0.1 * gap
    assert torch.allclose(logits(model), own["base"], atol=1e-5)


def test_a_mixed_batch(files: Path) -> None:
    """Each row by the fine-tune that it names, as if it were alone."""
    model = together(files)
    rows = ROWS[:1].repeat(3, 1)
    mixed = logits(model, rows, adapter_names=["sql", "__base__", "math"])
    with model.using("sql"):
        sql = logits(model, rows[:1])
    with model.using("math"):
        math = logits(model, rows[:1])
    expected = torch.cat([sql, logits(model, rows[:1]), math])
    assert torch.allclose(mixed, expected, atol=1e-3)
    made = model.generate(
        rows, adapter_names=["sql", "__base__", "math"], max_new_tokens=2, do_sample=False
    )
    assert made.shape == (3, 18)


def test_learned_positions_cannot_mix(tmp_path: Path) -> None:
    """GPT-2 looks positions up once for all rows of a batch."""
    build("gpt2").save_pretrained(tmp_path / "base")
    model = build("gpt2")
    tune(model)
    model.save_pretrained(tmp_path / "math")
    deltafold.compress(tmp_path / "base", tmp_path / "math", tmp_path / "m.delta", "lossless")
    loaded = deltafold.load(tmp_path / "base", deltas={"math": tmp_path / "m.delta"})
    with loaded.using("math"):
        assert torch.isfinite(logits(loaded)).all()
    refused(UsageError, lambda: logits(loaded, adapter_names=["math", "math"]), "using")


def test_one_copy_of_the_base(files: Path) -> None:
    """Parameters: the base's, and what the adapters' files hold; nothing twice."""
    base = sum(p.numel() for p in alone(files, "base").parameters())
    model = together(files)
    own = sum(p.numel() for n, p in model.named_parameters() if ".base_layer." in n)
    assert own <= base


def test_adapters_are_kept(files: Path) -> None:
    """The second time nothing is exported, unless the archive holds something else."""
    from deltafold.exporting.kept import find_adapter

    first = find_adapter("math", files / "math.delta", files / "base")
    stamp = (first.folder / "adapter_config.json").stat().st_mtime_ns
    again = find_adapter("other", files / "math.delta", files / "base")
    assert again.folder == first.folder
    assert (again.folder / "adapter_config.json").stat().st_mtime_ns == stamp
    assert find_adapter("math", files / "sql.delta", files / "base").folder != first.folder
    assert find_adapter("math", files / "math.delta", files / "base", rank=2).folder != first.folder


def test_wrong_names(files: Path) -> None:
    model = together(files)
    refused(UsageError, lambda: model.using("maths").__enter__(), "did you mean 'math'")
    refused(UsageError, lambda: logits(model, adapter_names=["maths", "sql"]), "did you mean")
    refused(UsageError, lambda: deltafold.load(files / "base", deltas={}), "at least one")
    refused(UsageError, lambda: deltafold.load(files / "base", deltas={"a b": "x"}), "'a b'")
    refused(UsageError, lambda: deltafold.load(files / "base", deltas={"a": "none"}), "none")
    refused(UsageError, lambda: deltafold.load(files / "math.delta"), "base")
