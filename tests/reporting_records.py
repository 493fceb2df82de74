"""Records made up for the tests of reporting: the shapes of real ones, values from formulas."""

from __future__ import annotations

import math
from typing import Any

MACHINE = {"deltafold": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0",
           "cpu": "Example CPU @ 2.4 GHz", "cores": 2, "memory_bytes": 24_000_000_000}  # fmt: skip
COMMON = {
    "record_version": 1,
    "machine": MACHINE,
    "seconds": 83.25,
    "peak_memory_bytes": 612_000_000,
}
KINDS = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def tensor(name: str, role: str, block: int | None, shape: tuple[int, ...], **values: Any) -> Any:
    elements = math.prod(shape)
    line = {"name": name, "role": role, "block": block, "shape": list(shape), "dtype": "BF16",
            "elements": elements, "codec": "impart", "bytes": elements // 16, "why": None,
            "relative_error": None, "delta_norm": 1.0, "base_norm": 30.0, "changed_share": 0.9,
            "spectrum": None}  # fmt: skip
    return line | values


def compress_record(blocks: int = 30, archive: str = "out/math.delta") -> dict[str, Any]:
    """A record of the size of SmolLM2-135M: 30 blocks, tied embedding."""
    tensors = [tensor("model.embed_tokens.weight", "embedding", None, (49152, 576),
                      relative_error=0.42, delta_norm=2.0)]  # fmt: skip
    for block in range(blocks):
        for at, (kind, shape) in enumerate(KINDS.items()):
            role = "attention" if "attn" in kind else "mlp"
            wave = 0.06 * math.sin(block / 4 + at)
            error = (0.55 if role == "attention" else 0.7) + wave - 0.004 * block
            top, count = 0.3 + 0.1 * at, min(shape)
            spectrum = [
                {"index": k, "value": top * math.exp(-3 * (k / count) ** (0.3 + 0.05 * at))}
                for k in range(0, count, max(1, count // 64))
            ]
            tensors.append(tensor(f"model.layers.{block}.{kind}.weight", role, block, shape,
                                  relative_error=error, spectrum=spectrum))  # fmt: skip
        name = f"model.layers.{block}.input_layernorm.weight"
        tensors.append(tensor(name, "norm", block, (576,), codec="lossless", bytes=700,
                              why="a norm is small and matters"))  # fmt: skip
    stored = sum(line["bytes"] for line in tensors)
    held = sum(2 * line["elements"] for line in tensors) + 3_500_000  # with the tokenizer
    archive_bytes = stored + 60_000 + 2_100_000
    return COMMON | {
        "kind": "compress", "base": "smollm2-base", "finetuned": "smollm2-math", "archive": archive,
        "method": "impart", "settings": {"method": "impart", "seed": 0, "workers": 1},
        "budget": {"kind": "file_ratio", "asked": 28.0, "got": held / archive_bytes},
        "totals": {"checkpoint_bytes": held, "archive_bytes": archive_bytes,
                   "file_ratio": held / archive_bytes, "nominal_ratio": 32.0,
                   "payload_bytes": stored, "manifest_bytes": 60_000, "files_bytes": 2_100_000},
        "tensors": tensors,
    }  # fmt: skip


SKILL = {"impart": 0.05, "lowrank": 0.11, "magnitude": 0.07, "dare": 0.3, "bitdelta": 0.09,
         "my-codec": 0.075}  # fmt: skip


def benchmark_row(method: str, asked: float | None, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"finetune": "arithmetic", "method": method, "asked_file_ratio": asked}
    return row | values


def benchmark_record(methods: tuple[str, ...] = tuple(SKILL)) -> dict[str, Any]:
    """Every method at five sizes (BitDelta at one), and one exact method."""
    rows = [benchmark_row("lossless", None, file_ratio=2.9, archive_bytes=92_900_000, kl=0.0,
                          exact_match=0.925, exact_match_stderr=0.019, agreement=1.0,
                          compress_seconds=31.0, restore_seconds=5.5,
                          peak_memory_bytes=410_000_000)]  # fmt: skip
    for method in methods:
        for asked in (4.0, 8.0, 16.0, 32.0, 64.0) if method != "bitdelta" else (13.0,):
            kl = SKILL[method] * (asked / 16) ** 1.4
            ratio = asked * 1.01
            match = 0.14 + 0.785 * math.exp(-1.6 * kl)
            rows.append(benchmark_row(
                method, asked, file_ratio=ratio, nominal_ratio=asked * 1.3,
                archive_bytes=round(269_400_000 / ratio), kl=kl, kl_stderr=kl / 15,
                exact_match=match, exact_match_stderr=math.sqrt(match * (1 - match) / 200),
                agreement=math.exp(-kl), compress_seconds=90 + asked, restore_seconds=6.0,
                peak_memory_bytes=600_000_000))  # fmt: skip
    return COMMON | {
        "kind": "benchmark", "title": "SmolLM2-135M", "model": "SmolLM2-135M-Instruct, bf16",
        "data": {"task": "arithmetic", "rows": 200}, "rows": rows,
        "reference": {"arithmetic": {"base": {"exact_match": 0.14, "kl": 2.4, "agreement": 0.31},
                                     "fine-tune": {"exact_match": 0.925, "agreement": 1.0}}},
    }  # fmt: skip


def metric(value: float, stderr: float | None = None, n: int = 200) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": n}


def evaluate_record() -> dict[str, Any]:
    def model(label: str, role: str, kl: float, match: float, **extra: Any) -> dict[str, Any]:
        task = {"exact_match": metric(match, 0.02), "kl": metric(kl, kl / 10),
                "agreement": metric(1 - kl / 3)}  # fmt: skip
        metrics = {"perplexity": metric(12 + kl, 0.3, 4096), "kl_text": metric(kl, kl / 10, 4096),
                   "agreement_text": metric(1 - kl / 3, None, 4096), "tasks": {"sums": task}}  # fmt: skip
        return {"label": label, "role": role, "path": label, "metrics": metrics} | extra

    return COMMON | {
        "kind": "evaluate",
        "models": [
            model("base", "base", 1.2, 0.14),
            model("math", "fine-tune", 0.0, 0.925),
            model("math.delta", "candidate", 0.04, 0.91, archive_bytes=8_400_000, file_ratio=32.0,
                  method="impart"),
        ],
    }  # fmt: skip
