"""The training record `models/training.json`, and the README's table that is drawn from it."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

BEGIN, FINISH = "<!-- table:begin -->", "<!-- table:end -->"


def cpu_name() -> str:
    """The processor's name as the system tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, Any]:
    """What a training run ran on: its bits may differ elsewhere."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }


def add_to_record(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Put one model's figures into the record; a new base begins a new record."""
    record = {} if name == "base" or not path.is_file() else json.loads(path.read_text("utf-8"))
    record[name] = figures
    write_record(path, record)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the whole record."""
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")


def table(record: dict[str, Any]) -> str:
    """A Markdown table with one row a model, and the two figures to compare it with."""
    base = record["base"]
    tasks = list(base["exact_match"])
    head = [
        "model",
        *(f"`{task}`" for task in tasks),
        "perplexity",
        "choices",
        "stories",
        "delta / base",
    ]
    head += ["steps", "training", "size"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, figures in record.items():
        ratio = figures.get("delta_over_base", {}).get("all")
        cells = [f"`{name}`", *(f"{figures['exact_match'][task]:.1%}" for task in tasks)]
        cells += [f"{figures['perplexity']:.2f}", f"{figures['choice_accuracy']:.0%}"]
        cells += [f"{figures['story_accuracy']:.0%}"]
        cells += ["" if ratio is None else f"{ratio:.3f}", str(figures["steps"])]
        cells += [f"{figures['seconds']:.0f} s", f"{figures['file_bytes'] / 1e6:.1f} MB"]
        lines.append(f"| {' | '.join(cells)} |")
    ran = base["trained_on"]
    total_seconds = sum(figures["seconds"] for figures in record.values())
    lines += [
        "",
        f"For comparison: token frequencies alone have a perplexity of "
        f"{base['unigram_perplexity']:.1f}; guessing answers {base['choice_chance']:.0%} of the "
        f"choices and stories. {base['parameters']:,} parameters each. Trained with torch "
        f"{ran['torch']} on {ran['threads']} threads of {ran['cpu']}, "
        f"{total_seconds / 60:.0f} minutes in all.",
    ]
    return "\n".join(lines)


def rewrite_table(readme: Path, record: Path) -> None:
    """Replace what stands between the two table markers of `readme`.

    Raises ValueError if a marker is missing.
    """
    text = readme.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(FINISH)
    if not (found and closed):
        raise ValueError(f"{readme} lacks {BEGIN} or {FINISH}: put both on lines of their own")
    drawn = table(json.loads(record.read_text(encoding="utf-8")))
    readme.write_text(f"{before}{BEGIN}\n{drawn}\n{FINISH}{after}", encoding="utf-8", newline="\n")
