"""Composed models of every family, for the tests of sharing and factoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from folding_models import DEPTH, build_deep, write_deep
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltafold.checkpoint import open_checkpoint
from deltafold.composed.form import Form, Linear, Part
from deltafold.composed.write import Source, write_shared

IDS = torch.arange(3, 27)[None]


def any_form(family: str, depth: int = DEPTH) -> Form:
    """Every linear layer of block 3 refers to block 2's and has two parts; none of the factors lent."""
    linears = {}
    for name, module in build_deep(family, depth).named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or ".3." not in name or "gate" in name[-18:]:
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
        linears[name] = Linear(
            shape=(rows, columns),
            weight=name.replace(".3.", ".2."),
            bias=module.bias is not None,
            transposed=transposed,
            parts=(Part(rows=rows - 8, rank=3), Part(rows=8, rank=2)),
        )
    return Form(linears=linears)


def random_factors(form: Form, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Factors of a form; the same each time."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: size * torch.randn(shape, generator=generator)
        for name, shape in form.factors().items()
    }


def write_composed(folder: Path, family: str, form: Form | None = None, **options: Any) -> Form:
    """`base/` and `shared/` in a folder; the form, `any_form` if none is given."""
    form = form or any_form(family)
    write_deep(folder / "base", family)
    with open_checkpoint(folder / "base") as checkpoint:
        write_shared(
            Source.of(checkpoint),
            form,
            random_factors(form).__getitem__,
            folder / "shared",
            **options,
        )
    return form
