"""Several fine-tunes become one model: the recipe of `merge`; sparsifiers and consensus rules in `methods`."""
