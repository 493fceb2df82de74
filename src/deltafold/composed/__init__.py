"""A model whose linear layers are composed of others' weights and of factors: form, layers, files."""
