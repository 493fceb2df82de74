"""Blocks of one model folded: similarity x selection x rule, as tables."""

from deltafold.folding.draft import Block, Draft
from deltafold.folding.layout import Layout, find_layout
from deltafold.folding.presets import METHODS, PRESETS, Method, Preset
from deltafold.folding.rules import RULES
from deltafold.folding.selection import SELECTIONS, Step
from deltafold.folding.similarity import SIMILARITIES

__all__ = [
    "METHODS",
    "PRESETS",
    "RULES",
    "SELECTIONS",
    "SIMILARITIES",
    "Block",
    "Draft",
    "Layout",
    "Method",
    "Preset",
    "Step",
    "find_layout",
]
