"""One file a figure: a function `draw(records, ink)` that yields (file name, figure)."""
