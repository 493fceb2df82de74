"""Matrices by rows, their truncated decompositions, and low-rank factors whitened by their inputs."""
