"""deltafold: LLM weights, stored as small differences from weights you already have.

>>> import deltafold
>>> deltafold.compress("base/", "math/", "math.delta", method="impart", file_ratio=32)  # doctest: +SKIP
>>> model = deltafold.load("math.delta", base="base/")                                  # doctest: +SKIP

Names are imported when first used, so that `import deltafold` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltafold.errors import DeltafoldError
from deltafold.version import __version__

if TYPE_CHECKING:
    from deltafold.codecs.tensors import codec
    from deltafold.compressing.catalogue import methods
    from deltafold.compressing.compress import compress
    from deltafold.compressing.plan import plan
    from deltafold.evaluation.evaluate import evaluate
    from deltafold.exporting.export import export
    from deltafold.exporting.load import load
    from deltafold.factoring.factor import factor
    from deltafold.folding.fold import fold
    from deltafold.merging.choosing import merge
    from deltafold.merging.recipe import Model, Recipe
    from deltafold.publishing.push import push_to_hub
    from deltafold.reporting.report import report
    from deltafold.restoring.inspect import inspect
    from deltafold.restoring.load import tensors
    from deltafold.restoring.restore import restore
    from deltafold.restoring.verify import verify
    from deltafold.sharing.share import share

_PUBLIC = {
    "compress": "deltafold.compressing.compress",
    "restore": "deltafold.restoring.restore",
    "export": "deltafold.exporting.export",
    "verify": "deltafold.restoring.verify",
    "inspect": "deltafold.restoring.inspect",
    "plan": "deltafold.compressing.plan",
    "methods": "deltafold.compressing.catalogue",
    "report": "deltafold.reporting.report",
    "load": "deltafold.exporting.load",
    "merge": "deltafold.merging.choosing",
    "fold": "deltafold.folding.fold",
    "factor": "deltafold.factoring.factor",
    "share": "deltafold.sharing.share",
    "evaluate": "deltafold.evaluation.evaluate",
    "push_to_hub": "deltafold.publishing.push",
    "tensors": "deltafold.restoring.load",
    "codec": "deltafold.codecs.tensors",
    "Model": "deltafold.merging.recipe",
    "Recipe": "deltafold.merging.recipe",
}

__all__ = [
    "DeltafoldError",
    "Model",
    "Recipe",
    "__version__",
    "codec",
    "compress",
    "evaluate",
    "export",
    "factor",
    "fold",
    "inspect",
    "load",
    "merge",
    "methods",
    "plan",
    "push_to_hub",
    "report",
    "restore",
    "share",
    "tensors",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        found = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'deltafold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
