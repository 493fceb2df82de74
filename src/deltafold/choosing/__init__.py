"""Verbs that measure models to choose by, or to say what came of it."""

from deltafold.choosing.compress import compress
from deltafold.choosing.factor import factor
from deltafold.choosing.fold import fold
from deltafold.choosing.merge import merge
from deltafold.choosing.share import share

__all__ = ["compress", "factor", "fold", "merge", "share"]
