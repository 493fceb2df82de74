"""Matrices by rows, their truncated decompositions, and low-rank factors whitened by their inputs."""

DAMPING = 1e-4
"""Share of the mean of the diagonal of second moments G that is added to it: directions that no text
showed still count a little, and the Cholesky factor exists. See `whitening.py`."""
