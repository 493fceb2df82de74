"""Write the example outputs of docs/commands/*.md from real runs on a small made-up pair.

    python scripts/write_examples.py

In a page, an example is a comment with the command line, and below it the block that is rewritten:

    <!-- example: deltafold inspect math.delta -->
    (a fenced block of text)

The pair is four blocks of width 256 under Llama's names with a delta whose singular values fall by a
third each. Commands run in the order of PAGES, in one temporary folder. Times and memory are those
of the machine at hand, so no test compares them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

DOCS = Path(__file__).parents[1] / "docs" / "commands"
PAGES = ("plan", "compress", "inspect", "verify", "restore", "methods")
EXAMPLE = re.compile(r"<!-- example: (deltafold [^\n]*?) -->\n```text\n.*?```", re.S)
WIDTH, MIDDLE, VOCABULARY, BLOCKS = 256, 512, 2048, 4


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}."
        found |= {f"{prefix}self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"}
        found |= {f"{prefix}mlp.{n}_proj.weight": (MIDDLE, WIDTH) for n in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (WIDTH, MIDDLE)
        found[f"{prefix}input_layernorm.weight"] = (WIDTH,)
    return found | {"model.norm.weight": (WIDTH,)}


def write_pair(folder: Path) -> None:
    """`base/` and `math/`: matrices moved by a decaying delta, 40 rows of the embedding, a norm."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for name, shape in shapes().items():
        weight = torch.ones(shape)
        if len(shape) == 2:
            weight = 0.05 * torch.randn(*shape, generator=generator)
        base[name] = weight.bfloat16()
        moved = base[name].float()
        if "embed" in name:
            moved[100:140] += 0.01 * torch.randn(40, WIDTH, generator=generator)
        elif len(shape) == 2:
            left = torch.randn(shape[0], 12, generator=generator) * 0.67 ** torch.arange(12)
            moved += 0.01 * left @ torch.randn(12, shape[1], generator=generator)
        elif name == "model.norm.weight":
            moved += 0.1 * torch.randn(shape, generator=generator)
        tuned[name] = moved.bfloat16()
    config = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": BLOCKS}
    for label, tensors in (("base", base), ("math", tuned)):
        (folder / label).mkdir()
        save_file(tensors, folder / label / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config | {"tie_word_embeddings": True, "name": label}, indent=1)
        (folder / label / "config.json").write_text(text)


def output_of(command: str, folder: Path) -> str:
    """What the command prints, both streams, lines as long as the terminal of a reader."""
    words = [sys.executable, "-m", "deltafold", *shlex.split(command)[1:]]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return "\n".join(line.rstrip() for line in (ran.stdout + ran.stderr).splitlines())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder)
        for page in (DOCS / f"{page}.md" for page in PAGES):

            def rerun(found: re.Match[str]) -> str:
                command = found.group(1)
                text = output_of(command, folder)
                return f"<!-- example: {command} -->\n```text\n{text}\n```"

            page.write_text(EXAMPLE.sub(rerun, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
