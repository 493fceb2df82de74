"""A whole model in memory, ready to teach or to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.building import first_line, quiet
from deltafold.errors import CheckpointError


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole model, frozen. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True
            )
    except Exception as error:  # the many ways in which a folder can be broken
        raise CheckpointError(
            f"{folder} cannot be loaded as a causal language model ({first_line(error)}); check its "
            "config.json and weight files."
        ) from error
    return model.to(device).eval().requires_grad_(False)
