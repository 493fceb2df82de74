"""How good a model is: perplexity, KL, exact match and multiple choice, under one setting for all."""
