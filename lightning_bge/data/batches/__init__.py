"""Effective batches in random order, cut into micro-batches by a maximum of tokens, and their loaders."""
