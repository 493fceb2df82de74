"""A model built from its config alone: modules on the meta device, blocks found, buffers computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltafold.calibration.models import class_of, config_of, quiet
from deltafold.errors import CheckpointError, MismatchError
from deltafold.foreign import blamed, first_line


def build(folder: Path, causal: bool = True) -> Any:
    """The model of a folder's config on the meta device; with `causal` one of language.

    Raises CheckpointError, MismatchError.
    """
    config = config_of(folder)
    if getattr(config, "quantization_config", None):
        raise MismatchError(
            f"{folder} holds quantised weights; calibration needs them in floating point."
        )
    kind = class_of(config, str(folder), causal)
    # Experts one by one: only then does each matrix meet its own inputs.
    options = {"experts_implementation": "eager"} if _has_experts(kind) else {}
    try:
        with torch.device("meta"), quiet():
            model = kind._from_config(config, dtype=torch.float32, **options)
    except Exception as error:  # a config that its own class refuses
        raise blamed(
            error,
            CheckpointError(
                f"No model can be built from the config of {folder} ({first_line(error)}); check it."
            ),
        ) from error
    return model.requires_grad_(False).eval()


def _has_experts(kind: Any) -> bool:
    can = getattr(kind, "_can_set_experts_implementation", None)
    return bool(can is not None and can())


def decoder_of(model: Any) -> Any:
    """The part of a model that holds its blocks: some call their last layer, the head, a decoder."""
    found = model.get_decoder()
    return model.base_model if isinstance(found, nn.Linear) else found


def find_blocks(model: Any, folder: Path) -> tuple[list[nn.Module], list[str]]:
    """The decoder's blocks in order, and their names."""
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for module in decoder_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            blocks = list(module)
            paths = {id(each): name for name, each in model.named_modules()}
            return blocks, [paths[id(block)] for block in blocks]
    raise MismatchError(
        f"{folder}: no list of {depth} blocks is found in a {type(model).__name__}, so it cannot "
        "be run or taken apart block by block; compress takes it with --calibration none."
    )


def find_stacks(model: nn.Module) -> list[str]:
    """Names of the blocks of a model of any kind, which may have several lists of them."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{each}.") for each in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists[name] = len(module)
    return [f"{each}.{number}" for each, depth in lists.items() for number in range(depth)]


def stored_buffers(model: Any) -> dict[str, Any]:
    """Buffers that checkpoints hold."""
    stored = set(model.state_dict())
    return {name: each for name, each in model.named_buffers() if name in stored}


def fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute, for real, the buffers that no checkpoint holds. Raises MismatchError.

    transformers fills them in the same way when it loads a model: by `_init_weights` of the class.
    """
    stored = set(model.state_dict())
    owner = model
    for path, module in model.named_modules():
        if hasattr(module, "_init_weights"):
            owner = module
        lacking = [
            name for name, each in module._buffers.items()
            if each is not None and f"{path}.{name}".lstrip(".") not in stored
        ]  # fmt: skip
        if not lacking:
            continue
        for name in lacking:
            empty = torch.empty_like(module._buffers[name], device=device)
            module._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
        with torch.no_grad():
            owner._init_weights(module)
        for name in lacking:
            values = module._buffers[name]
            if values.is_floating_point() and values.isnan().any():
                raise MismatchError(
                    f"{type(model).__name__} keeps {path}.{name} in no checkpoint and does not say "
                    "how to compute it, so it cannot be run; compress takes it with --calibration none."
                )
