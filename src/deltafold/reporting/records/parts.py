"""What typed records are made of: numbers that may be missing, a part, a run."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Part(BaseModel):
    """Fields that a report does not use are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Run(Part):
    """What every run says of itself."""

    command: str | None = None
    settings: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    seconds: Number = None
    peak_memory_bytes: Number = None
