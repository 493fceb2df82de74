"""The model of a `share` run in memory: teacher and student in one, trained, measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltafold.checkpoint import DTYPES
from deltafold.composed.form import Form
from deltafold.composed.modeling import compose, put
from deltafold.composed.write import Source
from deltafold.running.record import Record
from deltafold.sharing.methods.plan import Plan
from deltafold.sharing.methods.replacing import Schedule, SharedStudent, Swap
from deltafold.training import Masters, Rows, exam
from deltafold.training.loading import load_model


@dataclass
class ShareModel:
    """A model that can be given composed layers, and its own back."""

    folder: Path
    model: Any
    device: torch.device
    recompute: bool = False
    whole: Any = None  # a second copy as the teacher, where the first one's weights are trained

    @classmethod
    def load(
        cls, folder: Path, bf16: bool, device: torch.device, recompute: bool = False
    ) -> ShareModel:
        """In bf16, or in fp32."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        made = cls(folder, load_model(folder, dtype, device), device)
        if recompute:
            # In training mode only does transformers recompute; dropout is what else that turns on.
            made.model.train()
            for module in made.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                elif hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
            made.model.gradient_checkpointing_enable({"use_reentrant": False})
        return made

    def student(
        self,
        plan: Plan,
        factors: dict[str, torch.Tensor],
        changed: dict[str, torch.Tensor],
        schedule: Schedule,
        steps: int,
        seed: int,
        tune: str = "delta",
    ) -> SharedStudent:
        """The model with the plan's layers, all replaced. `close` gives the old ones back.

        `factors` by their names in the form: A (rank, in), B (rows, rank), scales (out,); `changed` are
        other parameters, in their shapes.
        """
        form = plan.form()
        originals = compose(self.model, form.to_json())
        if tune == "all" and self.whole is None:
            self.whole = load_model(self.folder, self.model.dtype, self.device)
        if tune == "all":
            originals = {name: self.whole.get_submodule(name) for name in originals}
        fill(self.model, form, factors, changed, originals)
        swaps = [
            Swap(name, tuple((self.model.get_submodule(path), originals[path]) for path in paths))
            for name, paths in plan.groups.items()
        ]
        self.model.requires_grad_(False)
        names = None if tune == "all" else set(form.factors())
        masters = Masters(
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if names is None or name in names
        )
        student = SharedStudent(self.model, swaps, schedule, steps, seed, masters)
        self._originals = originals
        return student

    def close(self) -> None:
        """Put the original layers back."""
        for name, module in self._originals.items():
            put(self.model, name, module)

    def teacher(self, student: SharedStudent) -> Callable[[torch.Tensor], torch.Tensor]:
        """Logits of the original: of the same model, or of a second copy where all is trained."""
        if self.whole is None:
            return student.teacher
        return lambda ids: self.whole(input_ids=ids, use_cache=False).logits


def fill(
    model: nn.Module,
    form: Form,
    factors: dict[str, torch.Tensor],
    changed: dict[str, torch.Tensor],
    originals: dict[str, nn.Module],
) -> None:
    """Values for what composed layers own: factors in fp32, biases of the layers that stood there.

    Factors are A (rank, in), B (rows, rank) and scales (out,), by their names in the form; biases
    (out,).
    """
    for name in form.factors():
        parent, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(parent)
        held = getattr(module, leaf)
        # A copy: what is trained must not move the values that others start from.
        setattr(module, leaf, nn.Parameter(factors[name].to(held.device, torch.float32, copy=True)))
    for path, linear in form.linears.items():
        if linear.bias:
            layer: Any = model.get_submodule(path)
            given = changed.get(f"{path}.bias", originals[path].bias)
            layer.bias.data = given.to(layer.bias).clone()  # type: ignore[operator]


def rounded(values: dict[str, torch.Tensor], source: Source, form: Form) -> dict[str, torch.Tensor]:
    """Values, in their shapes, as the file will hold them."""
    made = {}
    for name, value in values.items():
        if name in source.stored:
            dtype = source.checkpoint.tensors[source.stored[name]].dtype
        else:
            dtype = source.dtype_of(name.rpartition(".delta.")[0] or name.rpartition(".")[0])
        made[name] = value.to(DTYPES[dtype])
    return made


def set_values(student: SharedStudent, values: dict[str, torch.Tensor]) -> None:
    """Give a student's parameters other values, by name and in their shapes."""
    with torch.no_grad():
        for name, parameter in student.parameters.items():
            parameter.copy_(values[name])


def quality(student: SharedStudent, teacher: Any, rows: Rows, device: torch.device) -> Record:
    """Perplexity of the finished student, and its KL from the teacher, nats a token."""
    student.begin_exam()
    ce, kl = exam(student.logits, teacher, rows, device)
    return {"perplexity": math.exp(min(ce, 700.0)), "kl": kl}


def whole_quality(teacher: Any, rows: Rows, device: torch.device) -> Record:
    """Perplexity of the original model."""
    return {"perplexity": math.exp(min(exam(teacher, None, rows, device)[0], 700.0))}
