"""deltafold: LLM weights, stored as small differences from weights you already have.

>>> import deltafold
>>> deltafold.compress("base/", "math/", "math.delta", method="impart", file_ratio=32)  # doctest: +SKIP
>>> model = deltafold.load("math.delta", base="base/")                                  # doctest: +SKIP

The verbs are imported when first used, so that `import deltafold` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltafold.errors import DeltafoldError
from deltafold.version import __version__

if TYPE_CHECKING:
    from deltafold.choosing.compress import compress
    from deltafold.choosing.factor import factor
    from deltafold.choosing.fold import fold
    from deltafold.choosing.merge import merge
    from deltafold.choosing.share import share
    from deltafold.evaluation import evaluate
    from deltafold.publishing import push_to_hub
    from deltafold.verbs.export import export
    from deltafold.verbs.inspect import inspect
    from deltafold.verbs.load import load
    from deltafold.verbs.plan import plan
    from deltafold.verbs.restore import restore
    from deltafold.verbs.verify import verify

_VERBS = {
    "compress": "deltafold.choosing",
    "restore": "deltafold.verbs.restore",
    "export": "deltafold.verbs.export",
    "verify": "deltafold.verbs.verify",
    "inspect": "deltafold.verbs.inspect",
    "plan": "deltafold.verbs.plan",
    "load": "deltafold.verbs.load",
    "merge": "deltafold.choosing",
    "fold": "deltafold.choosing",
    "factor": "deltafold.choosing",
    "share": "deltafold.choosing",
    "evaluate": "deltafold.evaluation",
    "push_to_hub": "deltafold.publishing",
}

__all__ = [
    "DeltafoldError",
    "__version__",
    "compress",
    "evaluate",
    "export",
    "factor",
    "fold",
    "inspect",
    "load",
    "merge",
    "plan",
    "push_to_hub",
    "restore",
    "share",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        verb = getattr(import_module(_VERBS[name]), name)
        globals()[name] = verb
        return verb
    raise AttributeError(f"module 'deltafold' has no attribute {name!r}")
