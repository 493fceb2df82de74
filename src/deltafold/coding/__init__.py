"""Bits: seeded positions, packing, byte planes. Knows tensors and integers, no files, no models."""
