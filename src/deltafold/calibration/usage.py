"""How a model's own code uses its layers: told from their classes and the text of the code around them.

What stands in for a layer, or beside it, is met only where the layer is called. A class that computes
something else than its parent does, and code that reads a weight past the layer, are other things.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

import torch
from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether a layer computes x W^T and nothing else; a router may be a linear layer that goes on."""
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and _computes_a_product(kind)


@cache
def _computes_a_product(kind: Any) -> bool:
    """Whether a class's forward does what its parent's does, seen on a small layer."""
    if kind.forward is nn.Linear.forward:
        return True
    layer = nn.Linear(3, 2, device="cpu", dtype=torch.float32).requires_grad_(False)
    x = torch.arange(6, device="cpu", dtype=torch.float32).view(2, 3)
    try:
        made: Any = kind.forward(layer, x)
    except Exception:  # it wants more than a linear layer has
        return False
    return isinstance(made, torch.Tensor) and torch.allclose(made, layer(x))


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, its weight transposed; importing it would import all of transformers."""
    return type(module).__name__ == "Conv1D"


def looks_up_ids(module: nn.Module) -> bool:
    """Whether a table is asked for ids, which may be scaled then; one of positions works them out itself."""
    if not isinstance(module, nn.Embedding):
        return False
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def is_passed_over(model: nn.Module, path: str) -> bool:
    """Whether the code around a layer reads its weight and never calls it, as Mamba's does `dt_proj`.

    Or the size of a table, as Whisper's does, which nothing that is put in its place has.
    """
    parent, _, leaf = path.rpartition(".")
    around: Any = type(model.get_submodule(parent))
    code = _text(around)
    if re.search(rf"self\.{re.escape(leaf)}\.(?:num_embeddings|embedding_dim)\b", code):
        return True
    reads = re.search(rf"self\.{re.escape(leaf)}\.weight\b", code)
    return reads is not None and f"self.{leaf}(" not in code


def tied_layers(model: nn.Module) -> frozenset[str]:
    """Layers whose weight is another module's too, as in the blocks that Zamba uses several times."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return frozenset(name for found in names.values() if len(found) > 1 for name in found)


def is_rewritten(model: Any, path: str) -> bool:
    """Whether a model's code changes the weight of a layer in place, as RWKV's does before it runs."""
    leaf = re.escape(path.rpartition(".")[2])
    code = _text(sys.modules[type(model).__module__])
    return re.search(rf"\.{leaf}\.weight\.(?:add|div|mul|sub)_\(", code) is not None


@cache
def _text(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # code that lies nowhere
        return ""
