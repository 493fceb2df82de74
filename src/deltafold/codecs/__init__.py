"""One file a codec; pure functions of tensors; knows no file, no model.

`names()` lists them without importing anything heavy; `get(name)` gives the class.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from deltafold.errors import UsageError, nearest

if TYPE_CHECKING:
    from deltafold.codecs.base import Codec, DeltaCodec, ExactCodec

ENTRY_POINT_GROUP = "deltafold.codecs"
_NOT_CODECS = {"base", "seeded", "steps", "tensors"}


@cache
def names() -> tuple[str, ...]:
    """Names of all codecs: one a file of this folder, and those of other packages."""
    own = {module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)} - _NOT_CODECS
    return (*sorted(own), *sorted({e.name for e in entry_points(group=ENTRY_POINT_GROUP)} - own))


@cache
def get(name: str) -> type[Codec]:
    """The codec class called `name`. Raises UsageError with the nearest names."""
    if name not in names():
        raise UsageError(f"There is no method {name!r}; {nearest(name, list(names()))}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return entry.load()
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module.CODEC


def delta_codec(name: str, options: dict[str, Any] | None = None) -> DeltaCodec:
    """An instance of a lossy codec with these options. Raises UsageError."""
    from deltafold.codecs.base import DeltaCodec

    cls = get(name)
    if not issubclass(cls, DeltaCodec):
        raise UsageError(f"{name} is an exact codec and takes no settings.")
    return cls(cls.Config.from_options(name, options or {}))


def exact_codec(name: str) -> ExactCodec:
    """An instance of an exact codec."""
    from deltafold.codecs.base import ExactCodec

    cls = get(name)
    if not issubclass(cls, ExactCodec):
        raise UsageError(f"{name} is not an exact codec.")
    return cls()
