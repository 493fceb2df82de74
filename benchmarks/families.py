"""The pairs that are measured: which folders, which task, and what to say of them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2 import CALIBRATION_ROWS, FRONTIER, default_cache

from deltafold.errors import UsageError

DEMO = Path(__file__).parents[1] / "demo"


@dataclass(frozen=True)
class FineTune:
    """One fine-tune: its folder, held-out rows, calibration text, and words for a table."""

    name: str
    folder: Path
    task: Path
    calibration: Path
    training: str
    relative_delta_norm: float  # ||fine-tune - base|| / ||base||

    def data(self, rows: int) -> str:
        """What it is measured on and how it was trained."""
        held = sum(1 for line in self.task.read_text(encoding="utf-8").splitlines() if line)
        return (
            f"task {self.task.name.split('.')[0]}, {min(rows, held)} held-out rows; {self.training}"
        )


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes."""

    name: str
    title: str
    model: str
    base: Path
    finetunes: dict[str, FineTune]


def demo(cache: Path) -> Family:
    """The small family that lies in the repository; its calibration texts are put into the cache."""
    training = read(DEMO / "models" / "training.json")
    found = {
        name: FineTune(
            name,
            DEMO / "models" / name,
            DEMO / "tasks" / f"{name}.jsonl",
            demo_calibration(name, figures["seed"], cache),
            f"fine-tuned for {figures['steps']} steps, all parameters trained",
            figures["delta_over_base"]["all"],
        )
        for name, figures in training.items()
        if "delta_over_base" in figures
    }
    size = f"{training['base']['parameters'] / 1e6:.1f} M parameters, bf16"
    return Family("demo", "demo family", f"demo family ({size})", DEMO / "models" / "base", found)


def demo_calibration(name: str, seed: int, cache: Path) -> Path:
    """A text of prompts of the training rows, without answers."""
    sys.path.insert(0, str(DEMO))
    from data import task_rows

    path = cache / "tasks" / f"demo-{name}.calib.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    training_rows, _ = task_rows(name, seed)
    prompts = [row["prompt"] for row in training_rows[:CALIBRATION_ROWS]]
    path.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    return path


def smollm2(cache: Path) -> Family:
    """SmolLM2-135M-Instruct and those of its fine-tunes that have been prepared."""
    found = {}
    for name in FRONTIER:
        folder = cache / f"smollm2-{name}"
        if not (folder / "training.json").is_file():
            continue
        training = read(folder / "training.json")
        spec = training["settings"]
        found[name] = FineTune(
            name,
            folder,
            cache / "tasks" / f"{spec['task']}.test.jsonl",
            cache / "tasks" / f"{spec['task']}.calib.txt",
            f"fine-tuned for {spec['steps']} steps at learning rate {spec['lr']:g}, all "
            "parameters trained",
            training["relative_delta_norm"],
        )
    if not found:
        raise UsageError(
            f"{cache} holds no fine-tune; run: python benchmarks/smollm2.py prepare "
            f"--fine-tune {' '.join(FRONTIER)}"
        )
    parameters = read(cache / "smollm2-base" / "conversion.json")["parameters"]
    title = "SmolLM2-135M-Instruct"
    size = f"{parameters / 1e6:.1f} M parameters, bf16, tied embeddings"
    return Family("smollm2", title, f"{title} ({size})", cache / "smollm2-base", found)


def family(name: str, cache: Path | None = None) -> Family:
    """A family by its name. Raises UsageError when nothing is prepared."""
    folder = cache or default_cache()
    return demo(folder) if name == "demo" else smollm2(folder)


def read(path: Path) -> dict[str, Any]:
    """A JSON object of a file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
