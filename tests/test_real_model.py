"""SmolLM2-135M and a full fine-tune of it, as `benchmarks/smollm2.py prepare` leaves them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import deltafold

CACHE = Path(
    os.environ.get("DELTAFOLD_BENCH_CACHE", Path.home() / ".cache" / "deltafold" / "benchmarks")
)
BASE, TUNED = CACHE / "smollm2-base", CACHE / "smollm2-arithmetic"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TUNED.is_dir(), reason="run benchmarks/smollm2.py prepare first"),
]


def disk_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_ratio_32_restores_to_a_model_that_answers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    archive, restored = tmp_path / "a.delta", tmp_path / "restored"
    deltafold.compress(BASE, TUNED, archive, "impart", file_ratio=32)
    deltafold.restore(archive, BASE, restored)
    assert disk_bytes(restored) / disk_bytes(archive) == pytest.approx(32, rel=0.01)
    model = AutoModelForCausalLM.from_pretrained(restored)
    tokenizer = AutoTokenizer.from_pretrained(restored)
    rows = (CACHE / "tasks" / "arithmetic.test.jsonl").read_text().splitlines()[:20]
    right = 0
    for row in map(json.loads, rows):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += text.strip().split("\n")[0] == row["answer"].strip()
    assert right >= 5


def test_lossless_is_every_bit_in_half_the_bytes(tmp_path):
    record = deltafold.compress(BASE, TUNED, tmp_path / "a.delta", "lossless")
    deltafold.restore(tmp_path / "a.delta", BASE, tmp_path / "restored")
    name = "model.safetensors"
    assert (tmp_path / "restored" / name).read_bytes() == (TUNED / name).read_bytes()
    assert record["totals"]["file_ratio"] > 1.7


@pytest.mark.parametrize("rank", [None, 16])
def test_peft_predicts_what_export_says(tmp_path, rank):
    """KL and agreement that `export --text` tells are those of the adapter loaded by PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from deltafold.calibration import Sampling, gather_samples

    text = CACHE / "tasks" / "arithmetic.calib.txt"
    size = {"samples": 4, "max_tokens": 64}
    archive, adapter = tmp_path / "a.delta", tmp_path / "adapter"
    deltafold.compress(BASE, TUNED, archive, "svd-quant", file_ratio=64)
    told = deltafold.export(archive, adapter, base=BASE, rank=rank, text=text, **size)["text"]

    def predictions(model):
        rows = []
        for sample in gather_samples(BASE, Sampling(text, **size)):
            with torch.no_grad():
                logits = model.eval()(torch.tensor([sample.ids])).logits[0].double()
            rows.append(torch.log_softmax(logits, -1)[max(sample.start, 1) - 1 : -1])
        return torch.cat(rows)

    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    restored = predictions(deltafold.load(archive, base=BASE, dtype=torch.float32))
    for label in ("base", "adapter"):
        model = PeftModel.from_pretrained(plain, adapter) if label == "adapter" else plain
        here = predictions(model)
        kl = (restored.exp() * (restored - here)).sum(-1).mean()
        agreement = (restored.argmax(-1) == here.argmax(-1)).double().mean()
        assert told[label]["kl"] == pytest.approx(float(kl), rel=0.001, abs=1e-7)
        assert told[label]["agreement"] == pytest.approx(float(agreement), abs=0.005)
