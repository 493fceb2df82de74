"""Weights shared between blocks, and low-rank factors: one form for all methods.

    W = [own weight | another module's | nothing] + B A        and, if any, a bias

`form` says of each linear layer how it is composed, `modeling` is the layers themselves (the one file
that is also written beside the weights), `plan` chooses blocks and ranks, `initialise` the factors
that training starts from, `replacing` the schedule of progressive replacement.
"""
