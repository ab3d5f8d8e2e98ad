"""The search space and the parameter sets in it."""
