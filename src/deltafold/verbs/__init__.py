"""The verbs: each reads like the recipe that it is. Import them from `deltafold`."""
