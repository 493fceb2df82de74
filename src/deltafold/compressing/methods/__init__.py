"""The mathematics of a budget: who gets how many bytes. Pure: no file, no model."""
