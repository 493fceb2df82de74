"""`--steps`: what is left of a folded model, trained towards the whole one.

    loss   mean over tokens of KL(p || q)      p: the model's next token, q: the folded model's

Every weight moves; the rows held out say which state was the best. Both models are in memory for
this, the folded one with three fp32 numbers a weight: its master and two moments. A model that is
stored in bf16 runs in bf16 on a GPU, and on a CPU that is built for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltafold.calibration.models import quiet
from deltafold.calibration.stream import is_bf16, multiplies_bf16
from deltafold.checkpoint import Checkpoint
from deltafold.checkpoint.beside import copy_beside
from deltafold.checkpoint.writer import guard_storage
from deltafold.folding.run import FoldRun
from deltafold.running.devices import here
from deltafold.running.engine import Step
from deltafold.running.record import Record
from deltafold.running.workspace import Workspace
from deltafold.training import Masters, Settings, State, Watch, forward_tokens, pack, train
from deltafold.training.loading import load_model

STATE = "healing.safetensors"
ROW_TOKENS = 128
RATE, BATCH_ROWS = 1e-4, 8


class _Folded:
    """The folded model as a student: all its weights move, but those of sub-layers that were dropped."""

    def __init__(self, model: Any):
        self.model = model
        self.masters = Masters(
            (name, parameter)
            for name, parameter in model.named_parameters()
            if bool(parameter.any())
        )
        self.parameters: dict[str, nn.Parameter] = self.masters.parameters

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return made

    def begin_step(self, step: int) -> None:
        """The model runs on what its masters are now."""
        self.masters.round()

    def begin_exam(self) -> None:
        """As for a step."""
        self.masters.round()


def heal_folder(run: FoldRun, folder: Path, target: Path, workspace: Workspace) -> Record:
    """Train the model of `folder` towards the run's whole one, into `target`; rows for the record.

    A run that was broken off goes on from its last look at held-out text. Raises UsageError for too
    little text, CheckpointError, NonFiniteError, StorageError.
    """
    assert run.states is not None
    request, samples = run.request, run.states.samples
    steps, seed, progress = request.steps, request.seed, request.progress
    with Checkpoint(folder) as stored:
        short = is_bf16(stored) and (here().type != "cpu" or multiplies_bf16(here()))
    dtype = torch.bfloat16 if short else torch.float32
    teacher, model = (load_model(each, dtype, here()) for each in (run.checkpoint.path, folder))
    student = _Folded(model)
    learn, held = pack(samples, ROW_TOKENS).split(seed)
    settings = Settings(
        steps, RATE, BATCH_ROWS, kl_share=1.0, temperature=1.0, seed=seed,
        check_steps=max(1, min(25, steps // 4)), forward_tokens=forward_tokens(model, here()),
    )  # fmt: skip
    saved = workspace.load_tensors(STATE) if workspace.has(STATE) else None

    def report(state: State) -> None:
        if progress:
            words = f"held-out KL {state.best_kl:.3f}, {state.tokens_per_second:.0f} tokens/s"
            progress(Step("heal", words, float(state.step), float(steps), 0))

    watch = Watch(
        State.from_tensors(saved) if saved else None,
        save=lambda now: workspace.save_tensors(STATE, now.to_tensors()),
        report=report,
    )
    state = train(
        student,
        lambda ids: teacher(input_ids=ids, use_cache=False).logits,
        learn,
        held,
        settings,
        watch=watch,
    )
    student.masters.round()
    _write(model, folder, target, request.shard_bytes)
    return {
        "steps": state.step,
        "best_step": state.best_step,
        "rate_scale": state.scale,
        "training_tokens": learn.tokens,
        "exams": [{"step": int(step), "ce": ce, "kl": kl} for step, ce, kl in state.exams],
    }


def _write(model: Any, folder: Path, target: Path, shard_bytes: int) -> None:
    """The trained model in the dtype of its folder, with the side files as they were."""
    with Checkpoint(folder) as stored:
        config = stored.config()
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = getattr(torch, named.removeprefix("torch."), torch.float32)
    with quiet():
        guard_storage(
            target,
            lambda: model.to(dtype).save_pretrained(target, max_shard_size=shard_bytes),
        )
    copy_beside(folder, target, replace=True)
