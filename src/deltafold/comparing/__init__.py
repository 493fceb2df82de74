"""Base, fine-tune and what an archive restores, asked the same thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltafold.comparing.trio import Answer, Trio

__all__ = ["Answer", "Trio"]


def __getattr__(name: str) -> Any:
    """Imported when first used: the request is read without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deltafold.comparing import trio

    return getattr(trio, name)
