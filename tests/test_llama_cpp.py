"""Adapters of `export --to gguf-lora`, run by llama.cpp itself (the package xllamacpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, tune

from deltafold import compress, export

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
from gguf_models import write_gguf  # noqa: E402

pytestmark = pytest.mark.integration
PROMPT = [5, 17, 42, 99, 3, 120, 77, 8]


def predictions(model: Path, adapters: list[Path]) -> torch.Tensor:
    """Log probabilities of the token after the prompt, as llama.cpp computes them."""
    asked = xllamacpp.CommonParams()
    asked.model.path = str(model)
    asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path)) for path in adapters]
    asked.n_ctx, asked.n_parallel, asked.cpuparams.n_threads = 64, 1, 1
    asked.warmup, asked.verbosity, asked.port = False, 0, 0
    engine = xllamacpp.Server(asked)
    wish = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 160}
    found = engine.handle_completions(wish)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    made = torch.full((160,), float("nan"))
    for each in found:
        made[each["id"]] = each["logprob"]
    return made


def reference(base: Path, finetuned: Path, changed: set[str]) -> torch.Tensor:
    """The same by transformers, with the fine-tune's tensors of these names in the base."""
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    model, tuned = load(base), load(finetuned).state_dict()
    state = model.state_dict()
    model.load_state_dict({key: tuned[key] if key in changed else state[key] for key in state})
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1], -1)


def write_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A pair as `write_family` makes it, with attention that looks at some tokens far more.

    Weights as small as fresh ones look at all tokens alike, whatever q and k are.
    """
    for label in ("base", "finetuned"):
        model = build(name)
        if label == "finetuned":
            tune(model)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "attn" in key and weight.dim() == 2:
                    weight *= 8
        model.save_pretrained(folder / label)
    return folder / "base", folder / "finetuned"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_llama_cpp_predicts_what_the_pairs_say(name: str, tmp_path: Path) -> None:
    base, finetuned = write_pair(tmp_path, name)
    compress(base, finetuned, tmp_path / "x.delta", "lossless")
    made = export(tmp_path / "x.delta", tmp_path / "x.gguf", "gguf-lora", base=base, energy=1.0)
    changed = {row["name"] for row in made["tensors"] if row["how"] == "pair"}
    model = write_gguf(base, tmp_path / "base.gguf")
    before, after = (reference(base, finetuned, names) for names in (set(), changed))
    assert (predictions(model, []) - before).abs().max() < 0.02
    assert (after - before).abs().max() > 0.1
    assert (predictions(model, [tmp_path / "x.gguf"]) - after).abs().max() < 0.02
