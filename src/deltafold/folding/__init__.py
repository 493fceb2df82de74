"""One model with fewer blocks: the recipe of `fold`, one file a step; the papers' mathematics in `methods`."""
