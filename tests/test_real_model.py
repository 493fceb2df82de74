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
