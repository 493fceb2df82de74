"""The blocks of a model, told from names and shapes or from the model itself, and the units of a block."""
