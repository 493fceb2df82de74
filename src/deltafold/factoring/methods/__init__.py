"""Low-rank factors of a model's matrices: which methods there are, and the mathematics of each.

| matrices | which layers can be factored, and what each of them is to its block |
| units | what is factored together, what a rank costs, ranks for a number of parameters |
| factors | one matrix: plain or whitened, with a bias for the mean |
| basis | several blocks with one basis |
| welore, bolaco, lorc | ranks by one threshold, by search, by depth |
| experts | the mean of the experts, and a low-rank delta for each |
| presets | the methods as a table |
"""
