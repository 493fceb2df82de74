"""Several deltas of one base made into one: sparsifier x consensus x scale, as tables."""

from deltafold.merging.methods.consensus import CONSENSUS
from deltafold.merging.methods.presets import PRESETS, Preset
from deltafold.merging.methods.sparsify import SPARSIFIERS

__all__ = ["CONSENSUS", "PRESETS", "SPARSIFIERS", "Preset"]
