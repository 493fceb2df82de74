"""The mathematics of an adapter: pairs of matrices, and how many components each keeps. Pure."""
