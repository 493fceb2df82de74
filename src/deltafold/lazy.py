"""`torch`, imported when something of it is first used.

Reading headers, planning and checking bytes need no tensor, and importing torch takes longer than
they do. So rooms on their way say `from deltafold.lazy import torch`, and touch nothing of it while
they are imported: no table of dtypes, no default argument (see `deltafold/dtypes.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Stands for the module. It keeps nothing, so that what a test replaces in torch is seen."""

        __slots__ = ()

        @property
        def __dict__(self) -> dict[str, Any]:
            import torch

            return vars(torch)

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

        def __setattr__(self, name: str, value: Any) -> None:
            import torch

            setattr(torch, name, value)

        def __delattr__(self, name: str) -> None:
            import torch

            delattr(torch, name)

        def __reduce__(self) -> str:
            return "torch"  # pickled by name: tasks that travel refer to it

    torch = _Torch()
