"""The page "From Python": its examples run, in order, on tiny models, and name every public verb."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import tune

import deltafold

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```", re.M | re.S)
BLOCKS = BLOCK.findall(PAGE)


def tiny_family(folder: Path) -> None:
    """`base`, `math` and `sort`, of four blocks, with the demo's tokenizer; and a text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(ROOT / "demo" / "models" / "base")
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    for name, seed in (("base", 0), ("math", 1), ("sort", 2)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if seed:
            tune(model, seed)
        model.save_pretrained(folder / name)
        for file in (ROOT / "demo" / "models" / "base").glob("tokenizer*"):
            shutil.copy(file, folder / name)
    (folder / "text.txt").write_text("the fox lives in the wood and the hen in the yard. " * 40)


@pytest.mark.integration
def test_every_example_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_family(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, (skipped, source) in enumerate(BLOCKS):
        if not skipped:
            exec(compile(source, f"docs/python.md, example {number + 1}", "exec"), names)
    assert {name for name in names if name in ("estimate", "record", "norm", "scores", "close")} == {
        "estimate", "record", "norm", "scores", "close",
    }  # fmt: skip
    assert list(names["norm"]) == ["model.norm.weight"]  # type: ignore[call-overload]


def test_every_public_name_is_used() -> None:
    sources = "".join(source for _, source in BLOCKS)
    public = {name for name in deltafold.__all__ if not name.startswith("__")}
    assert {name for name in public if f"deltafold.{name}" not in sources} == set()
    assert dir(deltafold) == sorted(deltafold.__all__)
    assert [name for name in public if not hasattr(deltafold, name)] == []
