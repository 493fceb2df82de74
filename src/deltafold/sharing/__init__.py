"""One model whose blocks share weights: the recipe of `share`; plans and schedules in `methods`."""
