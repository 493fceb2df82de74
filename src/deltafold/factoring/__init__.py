"""The matrices of one model become low-rank factors: the recipe of `factor`; the mathematics in `methods`."""
