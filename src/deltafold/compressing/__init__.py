"""A fine-tune beside its base becomes an archive: the recipe of `compress` and of `plan`, one file a step."""
