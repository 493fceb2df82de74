"""Several deltas of one base made into one: sparsifier x consensus x scale, as tables."""

from deltafold.merging.consensus import CONSENSUS
from deltafold.merging.presets import PRESETS, Preset
from deltafold.merging.sparsify import SPARSIFIERS

__all__ = ["CONSENSUS", "PRESETS", "SPARSIFIERS", "Preset"]
