"""Deltas as adapters: which module takes which tensor, pairs of matrices, the files of engines."""
