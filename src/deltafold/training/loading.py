"""A whole model in memory, ready to teach or to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deltafold.calibration.models import load_folder


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole model, frozen. Raises CheckpointError, MismatchError."""
    model = load_folder(folder, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)
