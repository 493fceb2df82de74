"""A model larger than memory may be: moments, divergence and gradients under a limit.

A process for each is allowed some hundred megabytes of data more than it has after its imports,
by the system's own account (RLIMIT_DATA). The whole model in fp32 does not fit into that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deltafold.checkpoint import CheckpointWriter, plan_shards
from deltafold.checkpoint.writer import TensorSpec

VOCABULARY = 512

WORK = """
import gc, json, os, resource, sys
from pathlib import Path
import torch, transformers
from transformers.models.llama import modeling_llama
from deltafold.calibration import Judge, Sample, StreamedModel, backward, calibrate, make_batches

torch.set_num_threads(1)
folder, room_bytes, cache, *works = sys.argv[1:]
room_bytes = int(room_bytes)
gc.freeze()  # no fork looks through what was imported when it ends
torch.ones(64, 64) @ torch.ones(64, 64)
for work in works:  # each in a fork: all begin with what the imports hold, and the last one with no less
    if (child := os.fork()) == 0:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{work} failed")
else:
    sys.exit()
status = Path("/proc/self/status").read_text()
data_bytes = 1024 * int(status.partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + room_bytes, data_bytes + room_bytes))
samples = [Sample(tuple(range(3 + n, 67 + n)), 1) for n in range(6)]
memory_bytes = 16 << 20
if work == "whole":
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        result = "loaded"
    except (RuntimeError, MemoryError):
        result = "no room"
elif work == "moments":
    found = calibrate(folder, samples, memory_bytes=memory_bytes, cache=cache)
    result = len(found.names)
elif work == "kl":
    with Judge(folder, None, samples, memory_bytes) as judge:
        result = judge.kl(lambda name: 1.001 * judge.model.checkpoint.tensor(name).float())
else:
    model, names = StreamedModel(folder, memory_bytes=memory_bytes), set()
    backward(
        model, make_batches(samples, batch_tokens=256),
        lambda first, logits: logits.log_softmax(-1)[:, 5].sum(),
        lambda name, gradient: names.add(name),
    )
    result = len(names)
# The limit counts private memory alone: nothing may get around it by mapping files or sharing.
maps = Path("/proc/self/maps").read_text().splitlines()
around = [line for line in maps if os.path.dirname(folder) in line or "(deleted)" in line]
print(json.dumps({"work": work, "result": result, "around": around}), flush=True)
"""


def write_llama(folder: Path, blocks: int, width: int, middle: int) -> int:
    """A model of random bf16 weights, written a tensor at a time; its fp32 bytes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for block in range(blocks):
        at = f"model.layers.{block}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (middle, width) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (width, middle)
        shapes |= {f"{at}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}
    specs: list[TensorSpec] = [(name, "BF16", shape) for name, shape in shapes.items()]
    folder.mkdir()
    writer = CheckpointWriter(folder, plan_shards(specs, 1 << 28), {"format": "pt"})
    noise = 0.02 * torch.randn(width * max(middle, VOCABULARY), generator=torch.manual_seed(0))
    for name, shape in shapes.items():
        tensor = torch.ones(shape) if len(shape) == 1 else noise[: shape[0] * shape[1]]
        writer.write(name, tensor.reshape(shape).bfloat16())
    writer.finish()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY,
        "hidden_size": width, "intermediate_size": middle, "num_hidden_layers": blocks,
        "num_attention_heads": 8, "max_position_embeddings": 128, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def run(folder: Path, room_bytes: int, *works: str) -> dict[str, dict[str, Any]]:
    # Few arenas: each thread's would count towards the limit, used or not.
    settings = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "1000000",
    }
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(folder), str(room_bytes), f"{folder}.cache", *works],
        capture_output=True, text=True, timeout=280, env=os.environ | settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = map(json.loads, filter(lambda line: line.startswith("{"), done.stdout.splitlines()))
    found = {each["work"]: each for each in told}
    assert set(found) == set(works)
    return found


def check(folder: Path, blocks: int, whole_bytes: int, room_bytes: int) -> None:
    assert room_bytes < whole_bytes / 2
    told = run(folder, room_bytes, "whole", "moments", "kl", "gradients")
    assert told["whole"]["result"] == "no room"  # the limit does bind
    for work in ("moments", "kl", "gradients"):
        found = told[work]
        assert not found["around"], work
        if work == "kl":
            assert 0 < found["result"] < 1e-2
        else:
            matrices, vectors = 7 * blocks + 1, 2 * blocks + 2
            wanted = matrices if work == "moments" else matrices + vectors
            assert found["result"] == wanted


@pytest.mark.integration
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")
def test_a_model_larger_than_the_limit(tmp_path: Path) -> None:
    """20 blocks, 259 MB in fp32, in 84 MiB."""
    whole_bytes = write_llama(tmp_path / "model", 20, 512, 1408)
    assert whole_bytes > 258e6
    check(tmp_path / "model", 20, whole_bytes, 84 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")
def test_a_larger_model(tmp_path: Path) -> None:
    """64 blocks, 3.3 GB in fp32, in 400 MiB."""
    whole_bytes = write_llama(tmp_path / "model", 64, 1024, 2816)
    assert whole_bytes > 3.2e9
    check(tmp_path / "model", 64, whole_bytes, 400 << 20)
