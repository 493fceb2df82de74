"""Blocks of one model folded: similarity x selection x rule, as tables. Pure: no file, no checkpoint."""

from deltafold.blocks.layout import Layout, find_layout
from deltafold.folding.methods.draft import Block, Draft
from deltafold.folding.methods.presets import METHODS, PRESETS, Method, Preset
from deltafold.folding.methods.rules import RULES
from deltafold.folding.methods.selection import SELECTIONS, Step
from deltafold.folding.methods.similarity import SIMILARITIES

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
